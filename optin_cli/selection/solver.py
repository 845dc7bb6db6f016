"""The constrained mask: keep the units with the largest total score whose cost fits the budget.

Units of one cost form a class, and inside a class the best n units are always its n top-scored: what is left to
choose is how many of each class. For two classes (heads and neurons of a uniform transformer) every split is
tried, which is exact (METHOD section 4). For more, the Lagrangian relaxation gives the counts up to a few units,
and all counts near it are tried; the distance to the relaxation's upper bound is reported either way.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Solution:
    """Which units are kept, what they score and cost, and the best any mask could score."""

    keep: Bools
    score: float
    cost: float
    bound: float
    """Value of the LP relaxation: no mask within the budget scores more."""

    @property
    def gap(self) -> float:
        return max(0.0, self.bound - self.score)


def solve(scores: Floats, costs: Floats, budget: float, forced: Bools) -> Solution | None:
    """Maximise the kept score subject to total cost <= budget, with the `forced` units kept.

    All arrays have shape (units,), scores >= 0, costs > 0. Ties go to the lower index. Returns None when the forced
    units alone exceed the budget.
    """
    left = budget - costs[forced].sum()
    if left < -1e-9 * max(budget, 1.0):
        return None
    left = max(left, 0.0) * (1 + 1e-12)
    free = np.flatnonzero(~forced)
    classes = _classes(scores, costs, free)
    counts = _exact(classes, left) if len(classes) <= 2 else _near_relaxation(classes, left)
    keep = forced.copy()
    for members, count in zip(classes, counts, strict=True):
        keep[members.units[:count]] = True
    return Solution(
        keep,
        float(scores[keep].sum()),
        float(costs[keep].sum()),
        float(scores[forced].sum()) + _bound(classes, left),
    )


@dataclass(frozen=True)
class _Class:
    """Free units of one cost, best first, with the score of the n best for every n."""

    cost: float
    units: NDArray[np.intp]
    sums: Floats
    """[n + 1] prefix sums."""


def _classes(scores: Floats, costs: Floats, free: NDArray[np.intp]) -> list[_Class]:
    classes = []
    for cost in np.unique(costs[free]):
        members = free[costs[free] == cost]
        order = members[np.argsort(-scores[members], kind="stable")]
        classes.append(_Class(float(cost), order, np.concatenate([[0.0], np.cumsum(scores[order])])))
    return sorted(classes, key=lambda c: -c.cost)


def _fitting(members: _Class, budget: NDArray[np.floating] | float) -> NDArray[np.intp]:
    """How many units of a class fit into each budget."""
    return np.clip(np.floor(np.asarray(budget) / members.cost), 0, len(members.units)).astype(np.intp)


def _exact(classes: list[_Class], budget: float) -> list[int]:
    """One or two classes: every count of the dearer one, the rest filled with the cheaper."""
    if not classes:
        return []
    if len(classes) == 1:
        return [int(_fitting(classes[0], budget))]
    dear, cheap = classes
    counts = np.arange(int(_fitting(dear, budget)) + 1)
    filled = _fitting(cheap, budget - counts * dear.cost)
    best = int(np.argmax(dear.sums[counts] + cheap.sums[filled]))
    return [int(counts[best]), int(filled[best])]


def _near_relaxation(classes: list[_Class], budget: float, window: int = 3) -> list[int]:
    """More than two classes: counts around the relaxed optimum, the cheapest class filling what is left."""
    centre = [int(np.floor(n)) for n in _relaxed_counts(classes, budget)]
    *others, last = classes
    if len(others) > 4:  # (2 w + 1)^classes combinations: keep them countable
        window = 1 if len(others) <= 7 else 0
    ranges = [
        range(max(0, n - window), min(len(c.units), n + window) + 1)
        for n, c in zip(centre, others, strict=False)
    ]
    best, best_score = [0] * len(classes), -1.0
    for counts in product(*ranges):
        rest = budget - sum(n * c.cost for n, c in zip(counts, others, strict=True))
        if rest < 0:
            continue
        fill = int(_fitting(last, rest))
        score = sum(c.sums[n] for n, c in zip(counts, others, strict=True)) + last.sums[fill]
        if score > best_score:
            best, best_score = [*counts, fill], float(score)
    return _filled(classes, best, budget)


def _filled(classes: list[_Class], counts: list[int], budget: float) -> list[int]:
    """Add whatever still fits, best score for its cost first."""
    counts = list(counts)
    rest = budget - sum(n * c.cost for n, c in zip(counts, classes, strict=True))
    while True:
        gains = [
            ((c.sums[n + 1] - c.sums[n]) / c.cost, i)
            for i, (n, c) in enumerate(zip(counts, classes, strict=True))
            if n < len(c.units) and c.cost <= rest
        ]
        if not gains:
            return counts
        _, i = max(gains)
        counts[i] += 1
        rest -= classes[i].cost


def _densities(classes: list[_Class]) -> tuple[Floats, Floats, NDArray[np.intp]]:
    """(score per cost, cost, class) of all free units, densest first."""
    density = np.concatenate([np.diff(c.sums) / c.cost for c in classes] or [np.zeros(0)])
    cost = np.concatenate([np.full(len(c.units), c.cost) for c in classes] or [np.zeros(0)])
    owner = np.concatenate(
        [np.full(len(c.units), i, dtype=np.intp) for i, c in enumerate(classes)]
        or [np.zeros(0, dtype=np.intp)]
    )
    order = np.argsort(-density, kind="stable")
    return density[order], cost[order], owner[order]


def _relaxed_counts(classes: list[_Class], budget: float) -> Floats:
    """Counts of the LP optimum: units in order of score per cost until the budget is full."""
    _, cost, owner = _densities(classes)
    whole = np.cumsum(cost) <= budget
    return np.bincount(owner[whole], minlength=len(classes)).astype(float)


def _bound(classes: list[_Class], budget: float) -> float:
    """Value of the LP relaxation over the free units."""
    density, cost, _ = _densities(classes)
    spent = np.cumsum(cost)
    fraction = np.clip((budget - (spent - cost)) / np.where(cost > 0, cost, 1), 0, 1)
    return float((density * cost * fraction).sum())
