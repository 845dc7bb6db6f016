"""The choices of the knapsack: the sizes each site may have, and classes of sites that are solved as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]


@dataclass(frozen=True)
class Ladder:
    """The sizes one site may have, one a rung, ascending. Gains and costs never fall from rung to rung."""

    counts: Ints
    """[rungs] units kept."""
    gains: Floats
    """[rungs] total score of the best `counts` units."""
    costs: Floats
    """[budgets, rungs] what they use of each budget."""
    step: tuple[float, ...] | None = None
    """The cost of one rung up, if all rungs cost the same and gain ever less; None for any other shape."""


@dataclass(frozen=True)
class Class:
    """Ladders that are climbed together: of one step, or a single one of any shape.

    Ladders of one step are interchangeable rung by rung, so the best n rungs up of the class are the n with the
    largest gains, and one ladder with those prefix sums represents all of them.
    """

    members: tuple[int, ...]
    """Indices of the ladders."""
    gains: Floats
    """[rungs]"""
    costs: Floats
    """[budgets, rungs]"""
    owner: Ints | None = None
    """[rungs - 1] the member that each rung up belongs to; None with a single member."""
    falling: Floats | None = None
    """[rungs - 1] minus what each rung up gains, ascending; None where the shape is not a step's."""
    step: Floats | None = None
    """[budgets]"""

    def best(self, prices: Floats) -> int:
        """The rung with the largest gain less its costs at `prices`, shape (budgets,)."""
        if self.falling is not None and self.step is not None:
            return int(np.searchsorted(self.falling, -float(prices @ self.step)))
        return int(np.argmax(self.gains - prices @ self.costs))

    def fitting(self, room: Floats) -> Ints:
        """The highest rung that fits each column of `room`, shape (budgets, columns); -1 where none does."""
        rungs = [
            np.searchsorted(cost, left, side="right") for cost, left in zip(self.costs, room, strict=True)
        ]
        return np.min(rungs, axis=0) - 1 if rungs else np.full(room.shape[1], len(self.gains) - 1)

    def rungs(self, height: int) -> list[int]:
        """Return how far up each member is when the class is `height` rungs up."""
        if self.owner is None:
            return [height]
        return np.bincount(self.owner[:height], minlength=len(self.members)).tolist()


def classes_of(ladders: Sequence[Ladder]) -> list[Class]:
    """Group ladders by their step, in order of first appearance; ties of gains go to the earlier ladder."""
    groups: dict[tuple[float, ...] | int, list[int]] = {}
    for index, ladder in enumerate(ladders):
        key = index if ladder.step is None else ladder.step
        groups.setdefault(key, []).append(index)
    return [_class(ladders, members) for members in groups.values()]


def _class(ladders: Sequence[Ladder], members: list[int]) -> Class:
    first = ladders[members[0]]
    if first.step is None:
        return Class(tuple(members), first.gains, first.costs)
    ups = np.concatenate([np.diff(ladders[m].gains) for m in members])
    owner = np.repeat(np.arange(len(members)), [len(ladders[m].gains) - 1 for m in members])
    order = np.argsort(-ups, kind="stable")
    ups = ups[order]
    gains = sum(ladders[m].gains[0] for m in members) + np.concatenate([[0.0], np.cumsum(ups)])
    step = np.array(first.step)
    bottom = np.sum([ladders[m].costs[:, 0] for m in members], axis=0)
    costs = bottom[:, None] + step[:, None] * np.arange(len(gains))  # [budgets, rungs]
    return Class(tuple(members), gains, costs, owner[order], -ups, step)
