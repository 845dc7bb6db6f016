"""The constrained mask: a size for each site such that the kept score is largest and every budget holds.

A multiple-choice knapsack (docs/method.md, section 4): choose a size for each site. Sites of one cost per unit
melt into a class, so a uniform transformer has two classes whatever its depth, and then every split is tried, which
is exact for any number of budgets. Otherwise (several widths, measured latency) the Lagrangian relaxation gives
prices, and the choices around it are listed until the best one is proved or there are too many. The distance to the
relaxation's upper bound is reported either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from optin_cli.selection.choices import Class, Floats, Sizes, classes_of
from optin_cli.selection.relaxation import relax, value
from optin_cli.selection.search import SearchResult, search

_TOLERANCE = 1e-12
"""Of a budget: what sums of floats may differ by."""


@dataclass(frozen=True)
class Solution:
    """The units that each site keeps, their score and costs, and an upper bound of any choice's score."""

    counts: list[int]
    score: float
    costs: Floats
    """[budgets]"""
    bound: float
    """Value of the LP relaxation: no choice within the budgets scores more."""
    optimal: bool
    """True if it is proved that no choice scores more. Then a larger budget never scores less, either."""

    @property
    def gap(self) -> float:
        return max(0.0, self.bound - self.score)


def solve(site_sizes: Sequence[Sizes], budgets: Floats) -> Solution | None:
    """Maximise the total gain such that the total costs stay within `budgets`, shape (budgets,).

    Returns None when the smallest sizes alone exceed a budget. Ties go to the earlier site.
    """
    found = _solve(site_sizes, budgets)
    if found is None or not any(sizes.relaxed for sizes in site_sizes):
        return found
    loose = _solve([sizes.relaxed or sizes for sizes in site_sizes], budgets)
    assert loose is not None  # what was found fits
    bound = max(found.bound, loose.bound)
    return replace(found, bound=bound, optimal=found.optimal and bound <= found.score * (1 + _TOLERANCE))


def _solve(site_sizes: Sequence[Sizes], budgets: Floats) -> Solution | None:
    least = np.sum([sizes.costs[:, 0] for sizes in site_sizes], axis=0)  # [budgets]
    most = np.sum([sizes.costs[:, -1] for sizes in site_sizes], axis=0)
    slack = _TOLERANCE * np.maximum(most, np.abs(budgets))
    if (least > budgets + slack).any():
        return None
    heights = [len(sizes.counts) - 1 for sizes in site_sizes]
    binding = most > budgets + slack
    if not binding.any():
        return _solution(site_sizes, heights, None, True)
    # solve for what there is to choose within what can bind, in units in which a budget is at most one
    free = [i for i, height in enumerate(heights) if height]
    taken = sum((sizes.costs[:, 0] for sizes in site_sizes if len(sizes.counts) == 1), np.zeros(len(budgets)))
    room = (np.maximum(budgets, least) + slack - taken)[binding] / most[binding]
    classes = [_scaled(c, binding, most[binding]) for c in classes_of([site_sizes[i] for i in free])]
    found, bound = _best(classes, room)
    for members, pick in zip(classes, found.picks, strict=True):
        for member, height in zip(members.members, members.sizes(pick), strict=True):
            heights[free[member]] = height
    fixed = sum(float(sizes.gains[0]) for sizes in site_sizes if len(sizes.counts) == 1)
    return _solution(site_sizes, heights, bound + fixed, found.optimal)


def _best(classes: Sequence[Class], room: Floats) -> tuple[SearchResult, float]:
    """The best sizes that fit, and the relaxation's bound on what any could gain."""
    relaxed = relax(classes, room)
    if len(classes) <= 2:
        return SearchResult(_every_split(classes, room), 0.0, True), relaxed.bound
    picks = _filled(classes, relaxed.picks, room, relaxed.prices)
    short = max(0.0, relaxed.bound - value(classes, picks)[0])
    start = SearchResult(picks, short, short <= _TOLERANCE * relaxed.bound)
    return start if start.optimal else search(classes, relaxed.prices, room, start), relaxed.bound


def _scaled(members: Class, binding: np.ndarray, scale: Floats) -> Class:
    step = None if members.step is None else members.step[binding] / scale
    costs = members.costs[binding] / scale[:, None]
    return Class(members.members, members.gains, costs, members.owner, members.falling, step)


def _every_split(classes: Sequence[Class], room: Floats) -> list[int]:
    """One or two classes: every size of the shorter one, the rest of the budgets filled with the other."""
    if len(classes) == 1:
        return [int(classes[0].fitting(room[:, None])[0])]
    swapped = len(classes[0].gains) > len(classes[1].gains)
    short, long = classes[::-1] if swapped else classes
    filled = long.fitting(room[:, None] - short.costs)  # [sizes of the shorter]
    scores = np.where(filled < 0, -np.inf, short.gains + long.gains[filled])
    best = int(np.argmax(scores))
    picks = [best, int(filled[best])]
    return picks[::-1] if swapped else picks


def _filled(classes: Sequence[Class], picks: Sequence[int], room: Floats, prices: Floats) -> list[int]:
    """Climb wherever that still fits, the class that loses least at the prices first."""
    picks = list(picks)
    usage = value(classes, picks)[1]
    while True:
        best, step = -np.inf, None
        for index, (members, pick) in enumerate(zip(classes, picks, strict=True)):
            left = room - usage + members.costs[:, pick]
            top = int(members.fitting(left[:, None])[0])
            if top > pick:
                worth = members.gains[pick + 1 : top + 1] - prices @ members.costs[:, pick + 1 : top + 1]
                up = int(np.argmax(worth))
                gain = float(worth[up] - members.gains[pick] + prices @ members.costs[:, pick])
                if gain > best:
                    best, step = gain, (index, pick + 1 + up)
        if step is None:
            return picks
        index, size = step
        usage = usage + classes[index].costs[:, size] - classes[index].costs[:, picks[index]]
        picks[index] = size


def _solution(
    site_sizes: Sequence[Sizes], heights: Sequence[int], bound: float | None, optimal: bool
) -> Solution:
    pairs = list(zip(site_sizes, heights, strict=True))
    score = float(sum(sizes.gains[height] for sizes, height in pairs))
    return Solution(
        [int(sizes.counts[height]) for sizes, height in pairs],
        score,
        np.sum([sizes.costs[:, height] for sizes, height in pairs], axis=0),
        score if bound is None else max(bound, score),
        optimal,
    )
