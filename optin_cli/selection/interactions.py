"""Interactions: change which units go, so that what they cost together is less, not what they cost one by one.

The score of a set adds up its units' scores. Removed together they cost about ||sum of their rows||^2 with the rows
of the sketch (docs/method.md, section 5), whose diagonal is the scores. The rows of half the examples choose the
exchanges (PTF's mask rearrangement, here over the whole model), those of the other half say whether the gain is real.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from optin_cli.artefacts.facts import Change, Exchanged
from optin_cli.artefacts.ranking import RankedSite
from optin_cli.artefacts.sketch import Sketch
from optin_cli.importance import OPTIN_SUM, FeatureWeights, trajectories
from optin_cli.selection.choices import Floats, Ints, Sizes
from optin_cli.selection.swap_search import Exchange, Flags, Pool, Rows

RIDGE = 2.0
"""In scores: with hundreds of rows for thousands of units, half of it to four times as much found the least held-out
loss on real models."""
_ERRORS = 3.0
"""Standard errors that a held-out gain must exceed to be real."""
_NOTHING = 1e-9
_PATIENCE = 200
"""Moves, and as many again as were made, without a held-out gain after which the rest is given up."""


@dataclass(frozen=True)
class Half:
    """The rows of one half of the examples, scaled so that the squares of each unit add up to its score."""

    rows: Rows
    """[units, rows]"""
    examples: Ints
    """[rows]"""


@dataclass(frozen=True)
class Rearrangement:
    """A mask and what the exchanges did. Losses are shares of the score of all units."""

    keep: dict[str, list[int]]
    """Site name -> kept units, ascending; what came in, when `dropped`."""
    moved: int
    """Units that changed sides; 0 when `dropped`."""
    fit: tuple[float, float]
    """Joint loss with the ridge, before and after, on the half that chose the exchanges; never higher after."""
    held_out: tuple[float, float]
    """Joint loss without the ridge on the other half."""
    error: float
    """Standard error, over its examples, of the difference of `held_out`."""
    dropped: bool
    """The held-out half did not confirm the gain: the exchanges found were not made; the losses show why."""


def halves(
    sites: Sequence[RankedSite],
    scores: Sequence[Floats],
    sketch: Sketch,
    feature_weights: FeatureWeights = OPTIN_SUM,
) -> tuple[Half, Half]:
    """The rows that fit and the rows that check, of the trajectory and the weighted output alike.

    Neighbouring examples (the two texts of a pair) stay together. Each unit's rows of either term are scaled to
    what the term adds to `scores`: the signs and proportions are the sketch's, the diagonal is the ranking's,
    where heads may be exact and the scatter of the probes is averaged out.
    """
    names = [site.name for site in sites if site.units]  # a sketch has no sites without units
    first = sketch.examples // 2 % 2 == 0
    worth = np.concatenate(scores)
    terms = [(sketch.output, worth)]
    if sketch.trajectory:
        parts = trajectories(sites, feature_weights)
        trajectory = np.concatenate([parts[name] for name in names])
        output = np.maximum(worth - trajectory, 0.0)
        terms = [(sketch.trajectory, trajectory)]
        if output.sum() > _NOTHING * worth.sum():
            terms.append((sketch.output, output))
    return tuple(  # type: ignore[return-value]
        Half(
            np.concatenate([_scaled(part, names, rows, worth) for part, worth in terms], axis=1),
            np.tile(sketch.examples[rows], len(terms)),
        )
        for rows in (np.flatnonzero(first), np.flatnonzero(~first))
    )


def _scaled(part: Mapping[str, Rows], names: Sequence[str], rows: Ints, worth: Floats) -> Rows:
    """(units, rows): each unit's gradients, their squares adding up to its `worth`."""
    columns = np.concatenate([part[name][rows].T for name in names])
    squares = np.einsum("ur,ur->u", columns, columns, dtype=np.float64)
    factor = np.sqrt(np.divide(worth, squares, out=np.zeros_like(squares), where=squares > 0))
    return columns * factor.astype(np.float32)[:, None]


def pools(site_sizes: Sequence[Sizes], site: Ints, scope: str) -> list[Pool]:
    """Return the groups within which units may be exchanged: one site, or with `global` all sites of one cost a unit.

    Sites whose sizes are not free (rounded, kept whole, or of a latency that units do not add up to) keep theirs.
    """
    shared: dict[tuple[float, ...], list[int]] = {}
    found = []
    for index, sizes in enumerate(site_sizes):
        if scope == "global" and sizes.step is not None and sizes.counts[1] - sizes.counts[0] == 1:
            shared.setdefault(sizes.step, []).append(index)
        else:
            found.append(Pool(np.flatnonzero(site == index), None))
    found += [Pool(np.flatnonzero(np.isin(site, of)), np.array(step)) for step, of in shared.items()]
    return [pool for pool in found if len(pool.units)]


def rearrange(
    keep: Mapping[str, Sequence[int]],
    scores: Sequence[Floats],
    site_sizes: Sequence[Sizes],
    capacities: Floats,
    fit: Half,
    check: Half,
    scope: str,
    ridge: float = RIDGE,
) -> Rearrangement:
    """Exchange units of `keep` (sites in the order of `scores` and `site_sizes`) as long as that lowers the joint loss

        ||sum of the removed units' rows||^2 + ridge * sum of their scores,

    the ridge accounting for what the rows of half the examples don't show. On the held-out half the loss is without
    it: the moves up to its least are made, if that is `_ERRORS` standard errors below the start, and none otherwise.
    Costs stay within `capacities`, sizes are among `site_sizes`.
    """
    units = [len(s) for s in scores]
    site = np.repeat(np.arange(len(units)), units)
    worth = np.concatenate(scores)
    removed = _removed(keep, units)
    used = [
        sizes.costs[:, np.searchsorted(sizes.counts, len(kept))]
        for sizes, kept in zip(site_sizes, keep.values(), strict=True)
    ]
    least = np.array([sizes.counts[0] for sizes in site_sizes])
    room = capacities - np.sum(used, axis=0)
    exchange = Exchange(fit.rows, (1 + ridge) * worth, removed, site, least, room)
    checked = _HeldOutLoss(check, worth, removed)
    start, best, at = exchange.loss(), removed, 0
    for _ in exchange.improve(pools(site_sizes, site, scope)):
        if checked.better(exchange.removed):
            best, at = exchange.removed.copy(), exchange.moved
        if exchange.moved > 2 * at + _PATIENCE:
            break
    found = best if at else exchange.removed
    before, after, error = checked.difference(found)
    made = Exchange(fit.rows, exchange.diagonal, found, site, least, room).loss()
    dropped = exchange.moved > 0 and not (before - after > _ERRORS * error and made < start)
    best = removed if dropped else found
    total = float(worth.sum()) or 1.0
    parts = np.split(~best, np.cumsum(units)[:-1])
    return Rearrangement(
        keep={name: np.flatnonzero(part).tolist() for name, part in zip(keep, parts, strict=True)},
        moved=int((best != removed).sum()),
        fit=(start / total, made / total),
        held_out=(before / total, after / total),
        error=error / total,
        dropped=dropped,
    )


def as_facts(found: Rearrangement) -> Exchanged:
    """Return the entries that a mask records."""
    fit, held_out = (Change(before=before, after=after) for before, after in (found.fit, found.held_out))
    return {
        "ridge": RIDGE,
        "moved": found.moved,
        "dropped": found.dropped,
        "error": found.error,
        "fit": fit,
        "held_out": held_out,
    }


def _removed(keep: Mapping[str, Sequence[int]], units: Sequence[int]) -> Flags:
    """[all units] what `keep` leaves out, site after site."""
    flags = [np.ones(count, dtype=bool) for count in units]
    for gone, kept in zip(flags, keep.values(), strict=True):
        gone[np.asarray(kept, dtype=np.intp)] = False
    return np.concatenate(flags)


class _HeldOutLoss:
    """The loss of removed sets on the held-out half, against that of the set at the start."""

    def __init__(self, half: Half, diagonal: Floats, start: Flags) -> None:
        self.rows = half.rows
        _, self.example = np.unique(half.examples, return_inverse=True)
        squares = np.einsum("ur,ur->u", half.rows, half.rows, dtype=np.float64)
        self.rest = diagonal - squares
        self.start = self.last = start.copy()
        self.before = self.sum = half.rows[start].sum(axis=0, dtype=np.float64)  # (rows,)
        self.least = self._loss(self.sum, start)

    def better(self, removed: Flags) -> bool:
        """Return whether `removed`, a few moves after the last set asked about, is the best so far."""
        self.sum, self.last = self._moved(self.last, self.sum, removed), removed.copy()
        loss = self._loss(self.sum, removed)
        if loss < self.least:
            self.least = loss
            return True
        return False

    def difference(self, removed: Flags) -> tuple[float, float, float]:
        """(loss at the start, loss of `removed`, standard error of the difference over the examples)."""
        after = self._moved(self.start, self.before, removed)
        each = np.bincount(self.example, after**2 - self.before**2) if len(after) else np.zeros(0)
        error = float(np.sqrt(len(each) * each.var(ddof=1))) if len(each) > 1 else float("inf")
        return self._loss(self.before, self.start), self._loss(after, removed), error

    def _moved(self, start: Flags, total: Floats, removed: Flags) -> Floats:
        gone, back = np.flatnonzero(removed & ~start), np.flatnonzero(start & ~removed)
        return total + self.rows[gone].sum(0, dtype=np.float64) - self.rows[back].sum(0, dtype=np.float64)

    def _loss(self, total: Floats, removed: Flags) -> float:
        return float(total @ total + self.rest[removed].sum())
