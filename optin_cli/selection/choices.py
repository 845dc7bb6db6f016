"""The choices of the knapsack: the sizes each site may have, and classes of sites that are solved as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]


@dataclass(frozen=True)
class Sizes:
    """The sizes one site may have, ascending. Gains and costs never fall from one to the next."""

    counts: Ints
    """[sizes] units kept; of heads that may be cut to a lower rank the dimensions of all of them."""
    gains: Floats
    """[sizes] total score of the best `counts` units."""
    costs: Floats
    """[budgets, sizes] what they use of each budget."""
    step: tuple[float, ...] | None = None
    """What the next size costs more, if that is the same everywhere and gains ever less; None for any other shape."""
    width: int = 1
    """Counts that cost what a unit does."""
    relaxed: Sizes | None = None
    """More sizes than these, that cost no more than they do: for the bound, where some had to be left out."""


@dataclass(frozen=True)
class Class:
    """Sites that are sized together: of one step, or a single one of any shape.

    Steps of equal cost are interchangeable, so the best n steps up of the class are the n with the
    largest gains, and the prefix sums of those represent all of them.
    """

    members: tuple[int, ...]
    """Indices of the sites."""
    gains: Floats
    """[sizes]"""
    costs: Floats
    """[budgets, sizes]"""
    owner: Ints | None = None
    """[sizes - 1] the member that each step up belongs to; None with a single member."""
    falling: Floats | None = None
    """[sizes - 1] minus what each step up gains, ascending; None where the shape is not a step's."""
    step: Floats | None = None
    """[budgets]"""

    def best(self, prices: Floats) -> int:
        """The size with the largest gain less its costs at `prices`, shape (budgets,)."""
        if self.falling is not None and self.step is not None:
            return int(np.searchsorted(self.falling, -float(prices @ self.step)))
        return int(np.argmax(self.gains - prices @ self.costs))

    def fitting(self, room: Floats) -> Ints:
        """The largest size that fits each column of `room`, shape (budgets, columns); -1 where none does."""
        found = [
            np.searchsorted(cost, left, side="right") for cost, left in zip(self.costs, room, strict=True)
        ]
        return np.min(found, axis=0) - 1 if found else np.full(room.shape[1], len(self.gains) - 1)

    def sizes(self, height: int) -> list[int]:
        """Return the size (its index) that each member has when the class is `height` steps up."""
        if self.owner is None:
            return [height]
        return np.bincount(self.owner[:height], minlength=len(self.members)).tolist()


def classes_of(site_sizes: Sequence[Sizes]) -> list[Class]:
    """Group sites by their step, in order of first appearance; ties of gains go to the earlier site."""
    groups: dict[tuple[float, ...] | int, list[int]] = {}
    for index, sizes in enumerate(site_sizes):
        key = index if sizes.step is None else sizes.step
        groups.setdefault(key, []).append(index)
    return [_class(site_sizes, members) for members in groups.values()]


def _class(site_sizes: Sequence[Sizes], members: list[int]) -> Class:
    first = site_sizes[members[0]]
    if first.step is None:
        return Class(tuple(members), first.gains, first.costs)
    ups = np.concatenate([np.diff(site_sizes[m].gains) for m in members])
    owner = np.repeat(np.arange(len(members)), [len(site_sizes[m].gains) - 1 for m in members])
    order = np.argsort(-ups, kind="stable")
    ups = ups[order]
    gains = sum(site_sizes[m].gains[0] for m in members) + np.concatenate([[0.0], np.cumsum(ups)])
    step = np.array(first.step)
    bottom = np.sum([site_sizes[m].costs[:, 0] for m in members], axis=0)
    costs = bottom[:, None] + step[:, None] * np.arange(len(gains))  # [budgets, sizes]
    return Class(tuple(members), gains, costs, owner[order], -ups, step)
