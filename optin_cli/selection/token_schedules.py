"""Schedules of merges, searched for together with the sizes of sites: least score lost under one budget of MACs.

What a schedule loses adds up over its boundaries, and so does the score of the units that go. A block costs what the
tokens before it leave, so at a price of MACs the best schedule and the best sizes follow from a dynamic program over
blocks, whose state is the number of tokens a block sees: exact, whatever the number of schedules. Its value gives a
bound, and the schedules that are best at some price are the candidates; the best of them is then improved step by
step. For a given schedule the sizes are the solver's problem (selection/solver.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from optin_cli.artefacts.ranking import RankedSite
from optin_cli.selection.choices import Floats, Sizes
from optin_cli.structure.merge_schedule import most_merged, tokens_by_block

Schedule = tuple[int, ...]
_RISES, _HALVINGS = 24, 32
_FIRST_STEP = 8


@dataclass(frozen=True)
class Boundaries:
    """The boundaries where tokens may merge, and the losses there."""

    tokens: int
    """Of a whole sequence."""
    prefix: int
    depth: int
    losses: tuple[Floats, ...]
    """[counts from 0] for each block but the last: ascending from 0."""

    def loss(self, schedule: Schedule) -> float:
        """The sum over the boundaries; `inf` beyond what was measured."""
        pairs = list(zip(schedule, self.losses, strict=True))
        if any(count >= len(losses) for count, losses in pairs):
            return float("inf")
        return float(sum(losses[count] for count, losses in pairs))

    def allows(self, schedule: Schedule) -> bool:
        """Return whether every count can be merged at its boundary."""
        seen = tokens_by_block(self.tokens, self.depth, schedule, self.prefix)
        whole = all(after == before - n for before, after, n in zip(seen, seen[1:], schedule, strict=False))
        return whole and min(schedule, default=0) >= 0 and self.loss(schedule) < float("inf")


class Pricing:
    """Sites and boundaries at a price of MACs."""

    def __init__(
        self, sites: Sequence[RankedSite], site_sizes: Sequence[Sizes], boundaries: Boundaries, room: float
    ) -> None:
        self.sites = sites
        self.boundaries = boundaries
        self.room = room
        """MACs within which sites and schedule must stay."""
        score = sum(float(sizes.gains[-1]) for sizes in site_sizes)
        self.mean_price = score / max(room, 1.0) or 1.0
        self.hulls = [_Hull(sizes) for sizes in site_sizes]
        states = np.arange(boundaries.tokens + 1)
        self.costs = [site.macs_per_token * states + site.macs_per_pair * states**2 for site in sites]
        """[tokens seen] of one unit of each site."""
        most = max((len(losses) for losses in boundaries.losses), default=1)
        self.after = states[:, None] - np.arange(most)  # [tokens seen, tokens merged] -> tokens seen next
        free = np.array([most_merged(int(n), boundaries.prefix) for n in states])
        self.possible = np.arange(most) <= free[:, None]

    def best_at(self, price: float) -> tuple[Schedule, float, float]:
        """(schedule, its MACs with the best sizes, score kept less losses less the price of the MACs) at `price`."""
        worth = np.zeros((self.boundaries.depth, self.boundaries.tokens + 1))
        for site, hull, cost in zip(self.sites, self.hulls, self.costs, strict=True):
            worth[site.block] += hull.worth(price * cost)
        choices = []
        ahead = worth[-1]
        for block in range(self.boundaries.depth - 2, -1, -1):
            losses = self.boundaries.losses[block]
            count = len(losses)
            options = np.where(
                self.possible[:, :count], ahead[self.after[:, :count]] - losses, -np.inf
            )  # [tokens seen, tokens merged]
            choices.append(np.argmax(options, axis=1))
            ahead = worth[block] + options.max(axis=1)
        schedule, seen = [], self.boundaries.tokens
        for choice in reversed(choices):
            schedule.append(int(choice[seen]))
            seen -= schedule[-1]
        return tuple(schedule), self._macs(schedule, price), float(ahead[self.boundaries.tokens])

    def _macs(self, schedule: Sequence[int], price: float) -> float:
        used = 0.0
        for cost, hull in zip(self._unit_costs(schedule), self.hulls, strict=True):
            used += cost * float(hull.counts_at(np.array([price * cost]))[0])
        return used

    def _unit_costs(self, schedule: Sequence[int]) -> list[float]:
        """MACs of a unit of each site under a schedule."""
        border = self.boundaries
        seen = tokens_by_block(border.tokens, border.depth, schedule, border.prefix)
        return [site.macs_per_unit(seen[site.block]) for site in self.sites]

    def net(self, schedule: Schedule) -> float:
        """Score kept less losses of a schedule with the best sizes, one unit perhaps in part; `-inf` if none fit."""
        costs = self._unit_costs(schedule)
        room = self.room - sum(c * h.counts[0] for c, h in zip(costs, self.hulls, strict=True))
        if room < -1e-9 * self.room or not self.boundaries.allows(schedule):
            return -np.inf
        kept = sum(hull.gains[0] for hull in self.hulls) - self.boundaries.loss(schedule)
        sizes = np.concatenate([c * np.diff(h.counts) for c, h in zip(costs, self.hulls, strict=True)])
        gains = np.concatenate([np.diff(h.gains) for h in self.hulls])
        order = np.argsort(-gains / np.maximum(sizes, 1e-300), kind="stable")
        filled = np.cumsum(sizes[order])
        whole = int(np.searchsorted(filled, room, side="right"))
        kept += float(gains[order[:whole]].sum())
        if whole < len(order):
            left = room - (filled[whole - 1] if whole else 0.0)
            kept += float(gains[order[whole]] * left / sizes[order[whole]])
        return kept


class _Hull:
    """The sizes of a site that are best at some price: gains over counts, concave."""

    def __init__(self, sizes: Sizes) -> None:
        counts, gains = sizes.counts / sizes.width, sizes.gains
        kept: list[int] = []
        rest = range(len(counts))
        if sizes.step is not None:  # concave already
            kept, rest = list(rest), range(0)
        for size in rest:
            while len(kept) > 1 and not _bends(counts, gains, kept[-2], kept[-1], size):
                kept.pop()
            kept.append(size)
        self.counts = counts[kept]
        self.gains = gains[kept]
        self.falling = -np.diff(self.gains) / np.diff(self.counts)  # minus the score of a unit, ascending

    def worth(self, prices: Floats) -> Floats:
        """The most that gains exceed the price of the units by, for each price of a unit."""
        best = np.searchsorted(self.falling, -prices)
        return self.gains[best] - prices * self.counts[best]

    def counts_at(self, prices: Floats) -> Floats:
        """Return the best number of units at each price of a unit."""
        return self.counts[np.searchsorted(self.falling, -prices)]


def _bends(counts: Floats, gains: Floats, one: int, two: int, three: int) -> bool:
    """True if the middle of three sizes is above the line between the others."""
    return bool(
        (gains[two] - gains[one]) * (counts[three] - counts[two])
        > (gains[three] - gains[two]) * (counts[two] - counts[one])
    )


@dataclass(frozen=True)
class ScheduleCandidates:
    """The candidates, the most promising first, and what no schedule with any sizes can exceed."""

    schedules: list[Schedule]
    bound: float
    """Score kept less losses."""


def search_schedules(pricing: Pricing, starts: Sequence[Schedule] = ()) -> ScheduleCandidates:
    """Candidates from the dynamic program at many prices and from `starts`, the best of them improved."""
    found, bound = _priced(pricing)
    ranked = sorted(dict.fromkeys([*starts, *found]), key=lambda schedule: -pricing.net(schedule))
    improved = _improved(ranked[0], pricing.net)
    return ScheduleCandidates(list(dict.fromkeys([improved, *ranked])), bound)


def _priced(pricing: Pricing) -> tuple[list[Schedule], float]:
    """Schedules that are best at some price of MACs, around the price at which the budget is met; the best bound."""
    found: list[Schedule] = []
    bound = np.inf

    def fits(price: float) -> bool:
        nonlocal bound
        schedule, used, net = pricing.best_at(price)
        found.append(schedule)
        bound = min(bound, net + price * pricing.room)
        return used <= pricing.room

    if fits(0.0):
        return found, bound
    low, high = 0.0, pricing.mean_price / 1024
    for _ in range(_RISES):
        if fits(high):
            break
        low, high = high, 4 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return list(dict.fromkeys(found)), bound


def _improved(schedule: Schedule, net: Callable[[Schedule], float]) -> Schedule:
    """Merge a few more or fewer at a boundary, or move them to another, while that gains something."""
    best, value, step = schedule, net(schedule), _FIRST_STEP
    while step:
        better, better_value = best, value
        for option in _neighbours(best, step):
            if (one := net(option)) > better_value:
                better, better_value = option, one
        if better_value > value:
            best, value = better, better_value
        else:
            step //= 2
    return best


def _neighbours(schedule: Schedule, step: int) -> list[Schedule]:
    """Schedules with `step` more or fewer tokens merged at one boundary, or moved to the next one or back."""
    found = []
    for index in range(len(schedule)):
        for changes in (
            {index: step},
            {index: -step},
            {index: step, index + 1: -step},
            {index: -step, index + 1: step},
        ):
            if max(changes) < len(schedule):
                option = tuple(count + changes.get(i, 0) for i, count in enumerate(schedule))
                if min(option) >= 0:
                    found.append(option)
    return found
