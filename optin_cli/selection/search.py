"""The best whole choice, searched for around the relaxation's.

At the relaxation's prices every size of every class loses something against the class's best size, and a choice
scores the bound less the losses of its sizes less the price of the budget it leaves unused. So a choice within
`depth` of the bound has only sizes that lose less than `depth`: few, when `depth` is small. All of them are listed
class by class; if the best choice found is within `depth`, no other choice in the world is better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from optin_cli.selection.choices import Class, Floats, Ints

_MOST_STATES = 1 << 16
"""Partial choices kept at a time: beyond it, the search keeps the least losing ones and proves nothing."""
_STEPS = 14
_FEW = 512


@dataclass(frozen=True)
class SearchResult:
    """The best choice found, and whether it is proved to be optimal."""

    picks: list[int]
    short: float
    """The distance of its score from the bound."""
    optimal: bool


def search(
    classes: Sequence[Class],
    prices: Floats,
    budgets: Floats,
    start: SearchResult,
    most_states: int = _MOST_STATES,
) -> SearchResult:
    """Look for a choice that falls short of the bound by less than `start` does.

    `prices` and `budgets` have shape (budgets,). Deterministic: the effort is bounded by states, not by time.
    """
    best = start
    tables = [_Table(c, prices) for c in classes]
    order = sorted(
        range(len(classes)), key=lambda i: len(classes[i].gains)
    )  # the last one is filled, not listed
    for step in range(_STEPS, -1, -1):
        depth = start.short * 2.0**-step
        picks, short, complete = _listed([tables[i] for i in order], prices, budgets, depth, most_states)
        if picks is not None and short < best.short:
            back = dict(zip(order, picks, strict=True))
            best = SearchResult([back[i] for i in range(len(classes))], short, False)
        if not complete:
            return best
        if best.short <= depth:
            return SearchResult(best.picks, best.short, True)
    return SearchResult(best.picks, best.short, True)


class _Table:
    """Losses of a class's sizes at the prices, and the sizes by loss."""

    def __init__(self, members: Class, prices: Floats) -> None:
        self.costs = members.costs
        self.fitting = members.fitting
        worth = members.gains - prices @ members.costs
        self.loss = worth.max() - worth  # [sizes]
        self.by_loss = np.argsort(self.loss, kind="stable")
        self.sorted = self.loss[self.by_loss]

    def within(self, depth: float) -> Ints:
        """Sizes that lose at most `depth`, the least first."""
        return self.by_loss[: int(np.searchsorted(self.sorted, depth, side="right"))]


@dataclass
class _States:
    """Partial choices: over the classes so far, what each loses and uses, and where it came from."""

    loss: Floats
    """[states], ascending"""
    usage: Floats
    """[budgets, states]"""
    parent: Ints
    pick: Ints


def _listed(
    tables: Sequence[_Table], prices: Floats, budgets: Floats, depth: float, most: int
) -> tuple[list[int] | None, float, bool]:
    """(sizes of the best choice within `depth` of the bound, how far below it, whether all were listed)."""
    *listed, last = tables
    near = [table.within(depth) for table in tables]
    low = [t.costs[:, n].min(axis=1) for t, n in zip(tables, near, strict=True)]  # [budgets] each
    high = [t.costs[:, n].max(axis=1) for t, n in zip(tables, near, strict=True)]
    rest_low = np.cumsum(low[::-1], axis=0)[::-1]  # [classes, budgets]: of this and all later classes
    rest_high = np.cumsum(high[::-1], axis=0)[::-1]
    none = np.zeros(1, dtype=np.intp)
    trail = [_States(np.zeros(1), np.zeros((len(budgets), 1)), none, none)]
    complete = True
    for index, table in enumerate(listed):
        states = _extended(trail[-1], table, near[index], depth, 4 * most)
        room = budgets[:, None] - states.usage
        waste = prices @ np.maximum(room - rest_high[index + 1][:, None], 0)
        alive = (room >= rest_low[index + 1][:, None]).all(axis=0) & (states.loss + waste <= depth)
        states = _taken(states, np.flatnonzero(alive))
        if len(budgets) == 1 and len(states.loss) > _FEW:
            states = _undominated(states, prices)
        if len(states.loss) > most:
            states, complete = _taken(states, np.arange(most)), False
        complete = complete and len(states.loss) < 4 * most
        if not len(states.loss):
            return None, np.inf, complete
        trail.append(states)
    states = trail[-1]
    fill = last.fitting(
        budgets[:, None] - states.usage
    )  # gains never fall, so the largest size that fits is best
    usage = states.usage + last.costs[:, fill]
    short = states.loss + last.loss[fill] + prices @ (budgets[:, None] - usage)
    end = int(np.argmin(short))
    missing, picks = float(short[end]), [int(fill[end])]
    for states in trail[:0:-1]:
        picks.append(int(states.pick[end]))
        end = int(states.parent[end])
    return picks[::-1], missing, complete


def _extended(states: _States, table: _Table, picks: Ints, depth: float, most: int) -> _States:
    """Every state with every size that its loss leaves room for, least loss first; about `most` of them."""
    parts, total = [], 0
    for pick in picks:
        count = int(np.searchsorted(states.loss, depth - table.loss[pick], side="right"))
        if not count or total > most:
            break
        parts.append((pick, count))
        total += count
    parent = np.concatenate([np.arange(count) for _, count in parts])
    pick = np.repeat([r for r, _ in parts], [c for _, c in parts])
    loss = states.loss[parent] + table.loss[pick]
    usage = states.usage[:, parent] + table.costs[:, pick]
    order = np.argsort(loss, kind="stable")
    return _States(loss[order], usage[:, order], parent[order], pick[order])


def _taken(states: _States, index: Ints) -> _States:
    return _States(states.loss[index], states.usage[:, index], states.parent[index], states.pick[index])


def _undominated(states: _States, prices: Floats) -> _States:
    """Drop states that use as much as another and gain no more: one budget only."""
    usage = states.usage[0]
    gain = prices[0] * usage - states.loss
    order = np.lexsort((-gain, usage))
    best = np.maximum.accumulate(gain[order])
    keep = np.concatenate([[True], gain[order][1:] > best[:-1]])
    return _taken(states, np.sort(order[keep]))
