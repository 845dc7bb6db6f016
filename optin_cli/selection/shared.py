"""Budgets where layers stand between two sites, so that costs are products and not sums.

Half of such a layer for each of its sites never counts too little, but too much wherever both lose units: a chain
asked for 60 % would get 36 %. So the sums are allowed more than the budget, as much more as what is really used
permits (of latency see `shared_latency`). A bound comes from the other side: a product of what is kept is never
below the sum of both halves twice less the whole layer (McCormick).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np

from optin_cli.artefacts.shared import SharedLayer, overcounted
from optin_cli.selection.ladder import Floats
from optin_cli.selection.problem import Problem, stored_bytes
from optin_cli.selection.shared_latency import SharedTimes
from optin_cli.selection.solver import Solution, solve

_STEPS = 16
"""Halvings of the interval that the allowance is searched in."""


class Products:
    """The products in a problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.units = {site.name: site.units for site in problem.sites}
        self.layers: list[SharedLayer] = problem.ranking.shared
        table = problem.request.table
        self.times = SharedTimes(problem.ranking, table) if table and self.layers else None

    @cached_property
    def whole(self) -> Floats:
        """[budgets]: what the shared layers use with all units."""
        pairs = [self.units[layer.made] * self.units[layer.read] for layer in self.layers]
        return self._in_budgets(
            sum(n * layer.macs_per_token for n, layer in zip(pairs, self.layers, strict=True)),
            sum(n * layer.params for n, layer in zip(pairs, self.layers, strict=True)),
            self.times.whole if self.times else 0.0,
        )

    def overcounted(self, counts: list[int]) -> Floats:
        """[budgets]: what sums over sites count too much when `counts` units stay."""
        kept = dict(zip(self.units, counts, strict=True))
        ms = self.times.overcounted(kept) if self.times else 0.0
        return self._in_budgets(*overcounted(self.layers, self.units, kept), ms)

    def summed(self, counts: list[int]) -> Floats:
        """[budgets]: what `counts` units use by sums over sites."""
        pairs = zip(self.problem.ladders, counts, strict=True)
        return np.sum([ladder.costs[:, np.searchsorted(ladder.counts, n)] for ladder, n in pairs], axis=0)

    def used(self, counts: list[int]) -> Floats:
        """[budgets]: what `counts` units really use."""
        return self.summed(counts) - self.overcounted(counts)

    def __bool__(self) -> bool:
        return bool(self.whole.any())

    def fits(self, counts: list[int]) -> bool:
        capacities = self.problem.capacities
        return bool((self.used(counts) <= capacities + 1e-9 * np.abs(capacities)).all())

    def bound(self) -> float:
        """No choice within the budgets scores more."""
        ladders = []
        for site, ladder in zip(self.problem.sites, self.problem.ladders, strict=True):
            halves = [layer.halves(self.units).get(site.name, 0.0) for layer in self.layers]
            macs = sum(n * layer.macs_per_token for n, layer in zip(halves, self.layers, strict=True))
            params = sum(n * layer.params for n, layer in zip(halves, self.layers, strict=True))
            ms = self.times.beyond(site.name, ladder.counts) if self.times else np.zeros(len(ladder.counts))
            alone, a_ms = self._in_budgets(macs, params, 0.0), self._in_budgets(0.0, 0.0, 1.0)
            more = alone[:, None] * ladder.counts + a_ms[:, None] * ms  # [budgets, rungs]
            step = ladder.step
            if step is not None:
                step = tuple((step + alone * (ladder.counts[1] - ladder.counts[0])).tolist())
            ladders.append(replace(ladder, costs=ladder.costs + more, step=step))
        found = solve(ladders, self.problem.capacities + self.whole)
        return float("inf") if found is None else found.bound

    def _in_budgets(self, macs: float, params: float, ms: float) -> Floats:
        """[budgets]: an amount of MACs for each token, of parameters and of milliseconds, as each budget counts it."""
        amounts = {
            "MACs": macs * self.problem.tokens,
            "parameters": params,
            "memory": params * stored_bytes(self.problem.ranking),
            "latency": ms,
        }
        return np.array([amounts.get(budget.what, 0.0) for budget in self.problem.budgets])


def solve_products(problem: Problem) -> Solution | None:
    """The best choice found whose products meet every budget; `solver.solve` where there are no products.

    Returns None when nothing was found that meets them.
    """
    best = solve(problem.ladders, problem.capacities)  # within the budgets by sums is within them
    products = Products(problem)
    if not products or (best and best.counts == list(products.units.values())):
        return best
    low, high = 0.0, 0.5  # sums count at most half of a layer too much
    for _ in range(_STEPS):
        share = (low + high) / 2
        found = solve(problem.ladders, problem.capacities + share * products.whole)
        if found is not None and not products.fits(found.counts):
            high = share
            continue
        low = share
        if found is not None and (best is None or found.score >= best.score):
            best = found
    if best is None:
        return None
    everything = sum(float(ladder.gains[-1]) for ladder in problem.ladders)
    bound = max(min(products.bound(), everything), best.score)
    return replace(best, costs=products.used(best.counts), bound=bound, optimal=False)
