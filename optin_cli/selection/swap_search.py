"""Local search on the joint loss: exchange removed units for kept ones of the same cost, as long as that helps.

With g_u the rows of unit u and s the sum of the rows of the removed units, removing u changes the loss ||s||^2 by
2 g_u.s + ||g_u||^2, taking u back by -2 g_u.s + ||g_u||^2, and doing both at once by a further -2 g_i.g_j: given s,
every candidate costs one product with its rows (PTF's mask rearrangement in Gram form, docs/method.md, section 5). The
few best candidates of each side form a shortlist; only its Gram matrix is ever made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optin_cli.selection.choices import Floats, Ints

Rows = NDArray[np.float32]
Flags = NDArray[np.bool_]

_SHORTLIST = 128
"""Candidates of each side between two looks at all of them."""
_SWAPS = 48
"""Of one shortlist: later ones would pass over better candidates outside it."""
_DEAR = 24
"""Dear units of each side that are weighed against many cheap ones, and how many of those exactly."""
_WEIGHED = 3
_LEAST_GAIN = 1e-5
"""Smallest change that single precision resolves, as a share of the loss at the start."""


@dataclass(frozen=True)
class Pool:
    """Units that may be exchanged one for one. Several sites only where their units cost the same."""

    units: Ints
    step: Floats | None
    """[budgets] one unit's cost, where the numbers of units of its sites may change; None: they may not."""


@dataclass(frozen=True)
class _Trade:
    change: float
    """Of the loss."""
    dear: Ints
    """[1]"""
    cheap: Ints
    drop: bool
    """The dear unit goes and the cheap ones come back, or the other way round."""


class Exchange:
    """A removed set, with all that the effect of the next move depends on."""

    def __init__(
        self, rows: Rows, diagonal: Floats, removed: Flags, site: Ints, least: Ints, room: Floats
    ) -> None:
        """`rows` [units, rows]; `diagonal` [units] is what a unit loses alone; `site` [units] numbers the sites,
        which keep at least `least` units; `room` [budgets] is what is left of them."""
        self.rows = rows
        self.squares = np.einsum("ur,ur->u", rows, rows, dtype=np.float64)
        self.diagonal, self.removed, self.site = diagonal, removed.copy(), site
        self.least, self.room = least, room.copy()
        self.kept = np.bincount(site[~removed], minlength=len(self.least))
        self.sum = rows[removed].sum(axis=0, dtype=np.float64)  # (rows,)
        self.moved = 0
        self.threshold = _LEAST_GAIN * self.loss()

    def loss(self) -> float:
        """||s||^2 with the diagonal in place of the squares: of the removed set."""
        rest = (self.diagonal - self.squares)[self.removed]
        return float(self.sum @ self.sum + rest.sum())

    def improve(self, pools: Sequence[Pool]) -> Iterator[None]:
        """Move until nothing helps; yields after every few moves, so that the caller may look, and stop."""
        shared = [pool for pool in pools if pool.step is not None]
        while True:
            before = self.moved
            for pool in [*pools, *self._guarded(shared)]:
                if self._swap(pool):
                    yield
            if self.moved == before:
                for dear, cheap in _by_cost(shared):
                    if self._trade(dear, cheap):
                        yield
            if self.moved == before:
                return

    def _guarded(self, shared: Sequence[Pool]) -> list[Pool]:
        """Sites that may lose no unit to another site; units within one site still change places."""
        sites = [s for pool in shared for s in np.unique(self.site[pool.units])]
        return [Pool(np.flatnonzero(self.site == s), None) for s in sites if self.kept[s] <= self.least[s]]

    def _changes(self, units: Ints) -> tuple[Floats, Floats]:
        """(of removing, of taking back) each of `units`: the change of the loss."""
        pull = 2.0 * self._product(units, self.sum.astype(np.float32)).astype(np.float64)
        alone = self.diagonal[units]
        return pull + alone, 2 * self.squares[units] - alone - pull

    def _product(self, units: Ints, other: Rows) -> Rows:
        """rows[units] @ other, without a copy of the rows where the units are most of a range."""
        first, last = (units.min(), units.max()) if len(units) else (0, 0)
        if 4 * len(units) < last - first:
            return self.rows[units] @ other
        return (self.rows[first : last + 1] @ other)[units - first]

    def _move(self, out: Ints, back: Ints) -> None:
        """Remove `out` and take `back` back."""
        self.removed[out], self.removed[back] = True, False
        self.sum += self.rows[out].sum(axis=0, dtype=np.float64) - self.rows[back].sum(
            axis=0, dtype=np.float64
        )
        np.subtract.at(self.kept, self.site[out], 1)
        np.add.at(self.kept, self.site[back], 1)
        self.moved += len(out) + len(back)

    def _swap(self, pool: Pool) -> int:
        """Exchange units of a pool one for one, the pair that gains most first; returns how many pairs."""
        units = pool.units
        losing, regaining = self._changes(units)
        free = self._spare(units, pool.step is not None)
        out = _smallest(losing, np.flatnonzero(~self.removed[units] & free), _SHORTLIST)
        back = _smallest(regaining, np.flatnonzero(self.removed[units]), _SHORTLIST)
        if not len(out) or not len(back):
            return 0
        losing, regaining, out, back = losing[out], regaining[back], units[out], units[back]
        listed = self.rows[np.concatenate([out, back])]
        gram = (listed @ listed.T).astype(np.float64)  # (out + back, out + back)
        cross = 2 * gram[: len(out), len(out) :]
        pairs = 0
        while pairs < _SWAPS:
            change = losing[:, None] + regaining - cross
            i, j = divmod(int(np.argmin(change)), len(back))
            if not change[i, j] < -self.threshold:
                break
            self._move(out[i : i + 1], back[j : j + 1])
            pull = 2 * (gram[i] - gram[len(out) + j])
            losing += pull[: len(out)]
            regaining -= pull[len(out) :]
            losing[i] = regaining[j] = np.inf  # has moved
            if pool.step is not None:
                losing[~self._spare(out, True)] = np.inf
            pairs += 1
        return pairs

    def _spare(self, units: Ints, leaves: bool) -> Flags:
        """Return which of `units` their sites can spare: all, if another unit of the site comes back."""
        if not leaves:
            return np.ones(len(units), dtype=bool)
        return (self.kept > self.least)[self.site[units]]

    def _trade(self, dear: Pool, cheap: Pool) -> bool:
        """Exchange one dear unit for as many cheap ones as it pays for, either way, where that gains most."""
        assert dear.step is not None and cheap.step is not None
        paid = cheap.step > 0
        losing, regaining = self._changes(dear.units)
        spare = self._spare(dear.units, True)
        moves = []
        for drop, change in ((True, losing), (False, regaining)):
            able = ~self.removed[dear.units] & spare if drop else self.removed[dear.units]
            each = _smallest(change, np.flatnonzero(able), _DEAR)
            many = ((self.room + dear.step) if drop else (dear.step - self.room))[paid] / cheap.step[paid]
            number = int(np.floor(many.min() + 1e-9) if drop else np.ceil(max(many.max(), 0.0) - 1e-9))
            moves += self._weighed(dear.units[each], change[each], cheap.units, number, drop)
        best = min(moves, key=lambda move: move.change, default=None)
        if best is None or not best.change < -self.threshold:
            return False
        self._move(*((best.dear, best.cheap) if best.drop else (best.cheap, best.dear)))
        self.room += (dear.step - cheap.step * len(best.cheap)) * (1 if best.drop else -1)
        return True

    def _weighed(self, dear: Ints, alone: Floats, cheap: Ints, number: int, drop: bool) -> list[_Trade]:
        """The most promising trades for `number` of `cheap`; `alone` is what the dear units change by themselves."""
        able = self.removed[cheap] if drop else ~self.removed[cheap] & self._spare(cheap, True)
        cheap = cheap[able]
        if not len(dear) or (len(cheap) < number and not drop):
            return []
        number = min(number, len(cheap))
        losing, regaining = self._changes(cheap)
        pull = 2.0 * self._product(cheap, self.rows[dear].T)  # (cheap, dear)
        # a dear unit that goes adds its rows to s, which pulls cheap ones back; one that returns takes them off s
        change = (regaining if drop else losing)[:, None] - pull
        first = np.partition(change, max(number - 1, 0), axis=0)[:number].sum(axis=0)
        found = []
        for index in np.argsort(alone + first, kind="stable")[:_WEIGHED]:
            likely = _smallest(change[:, index], np.arange(len(cheap)), 4 * number)
            total, chosen = self._greedy(cheap[likely], change[likely, index], number, not drop)
            if len(chosen) == number or drop:
                found.append(_Trade(float(alone[index]) + total, dear[index : index + 1], chosen, drop))
        return found

    def _greedy(self, units: Ints, change: Floats, number: int, leaves: bool) -> tuple[float, Ints]:
        """Move `number` of `units` all one way, the best first: (total change of the loss, which)."""
        rows = self.rows[units]
        gram = 2.0 * (rows @ rows.T).astype(np.float64)
        kept, site, change = self.kept.copy(), self.site[units], change.copy()
        total, chosen = 0.0, []
        for _ in range(number):
            best = int(np.argmin(change))
            if not np.isfinite(change[best]):
                break
            total += change[best]
            chosen.append(best)
            change += gram[best]  # the next one the same way meets this one's rows
            change[best] = np.inf
            if leaves:
                kept[site[best]] -= 1
                change[(kept <= self.least)[site]] = np.inf
        return total, units[chosen]


def _by_cost(pools: Sequence[Pool]) -> Iterator[tuple[Pool, Pool]]:
    """Pairs of pools of which one's units cost more of every budget that counts units."""
    for dear in pools:
        for cheap in pools:
            assert dear.step is not None and cheap.step is not None
            if dear is not cheap and (dear.step >= cheap.step).all() and (cheap.step > 0).any():
                yield dear, cheap


def _smallest(values: Floats, among: Ints, number: int) -> Ints:
    """The `number` of indices `among` with the smallest values, the smallest first; ties to the lower index."""
    return among[np.argsort(values[among], kind="stable")[:number]]
