"""The LP relaxation: an upper bound on what any choice within the budgets can score, and prices of the budgets.

The relaxation may mix sizes of a class (any point below the concave hull of its gains over its costs). It is solved
by Dantzig-Wolfe column generation: the master, a linear program of one row a budget and one for the mixture, is
held as a simplex basis; at its prices every class picks its best size by itself, and that pick is the next column.
Any prices >= 0 give a valid bound (weak duality), so stopping early costs tightness, never truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from optin_cli.selection.choices import Class, Floats

_MOST_COLUMNS = 300
_EPSILON = 1e-12
_PIVOT = 1e-10


@dataclass(frozen=True)
class Relaxation:
    """The best prices found, the bound they give, and the best whole choice that fits, met on the way."""

    bound: float
    prices: Floats
    """[budgets], >= 0: score that one more unit of each budget is worth."""
    picks: list[int]
    """A size for each class, within the budgets."""
    score: float


def relax(classes: Sequence[Class], budgets: Floats) -> Relaxation:
    """Solve the relaxation. The smallest sizes together must fit `budgets`, shape (budgets,), about 1 each."""
    size = len(budgets)
    picks = [0] * len(classes)
    gain, usage = value(classes, picks)
    best = Relaxation(float("inf"), np.zeros(size), picks, gain)
    scale = max(sum(float(c.gains[-1]) for c in classes), 1e-300)
    # rows: budgets, then the weights of the mixture, which add up to 1; columns: the first pick and the slacks
    basis = np.zeros((size + 1, size + 1))
    basis[:size, 0], basis[size, 0] = usage, 1
    basis[:size, 1:] = np.eye(size)
    worth = np.array([gain / scale, *[0.0] * size])
    right = np.array([*budgets, 1.0])
    for _ in range(_MOST_COLUMNS):
        prices = np.linalg.solve(basis.T, worth)
        cheapest = int(np.argmin(prices[:size]))
        if prices[cheapest] < -_EPSILON:  # a budget that is not used up: its slack enters
            column, gain = np.eye(size + 1)[cheapest], 0.0
        else:
            fair = np.maximum(prices[:size], 0.0) * scale
            picks = [c.best(fair) for c in classes]
            gain, usage = value(classes, picks)
            bound = gain + float(fair @ (budgets - usage))
            if bound < best.bound:
                best = Relaxation(bound, fair, best.picks, best.score)
            if gain > best.score and (usage <= budgets).all():
                best = Relaxation(best.bound, best.prices, picks, gain)
            gain /= scale
            column = np.array([*usage, 1.0])
            if gain - prices @ column <= _EPSILON:
                break
        if not _enter(basis, worth, right, column, gain):
            break
    return best


def value(classes: Sequence[Class], picks: Sequence[int]) -> tuple[float, Floats]:
    """Total gain, and total cost of shape (budgets,)."""
    gain = sum(float(c.gains[p]) for c, p in zip(classes, picks, strict=True))
    return gain, np.sum([c.costs[:, p] for c, p in zip(classes, picks, strict=True)], axis=0)


def _enter(basis: Floats, worth: Floats, right: Floats, column: Floats, gain: float) -> bool:
    """One simplex step, in place; False if rounding leaves no step to take."""
    amounts, direction = np.linalg.solve(basis, np.stack([right, column], axis=1)).T
    rising = direction > _PIVOT
    if not rising.any():
        return False
    steps = np.full(len(direction), np.inf)
    steps[rising] = np.maximum(amounts[rising], 0) / direction[rising]
    leaving = int(np.argmin(steps))
    basis[:, leaving], worth[leaving] = column, gain
    return True
