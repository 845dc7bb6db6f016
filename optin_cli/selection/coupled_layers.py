"""Solve budgets where layers couple two sites, so that costs are products and not sums.

Half of such a layer for each of its sites never counts too little, but too much wherever both lose units: a chain
asked for 60 % would get 36 %. So the sums are allowed more than the budget, as much more as what is really used
permits (of latency see `shared_latency`). A bound comes from the other side: a product of what is kept is never
below the sum of both halves twice less the whole layer (McCormick).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np

from optin_cli.selection.choices import Floats
from optin_cli.selection.problem import Problem
from optin_cli.selection.solver import Solution, solve

_STEPS = 16
"""Halvings of the interval that the allowance is searched in."""


class Products:
    """The products in a problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.case = problem, problem.case

    @cached_property
    def whole(self) -> Floats:
        """[budgets]: what the coupled layers use with all units."""
        return np.array([float(budget.shared_whole(self.case)) for budget in self.problem.budgets])

    def overcounted(self, counts: list[int]) -> Floats:
        """[budgets]: what sums over sites count too much when `counts` units stay."""
        kept = dict(zip(self.case.units, counts, strict=True))
        return np.array([float(budget.overcounted(self.case, kept)) for budget in self.problem.budgets])

    def summed(self, counts: list[int]) -> Floats:
        """[budgets]: what `counts` units use by sums over sites."""
        pairs = zip(self.problem.site_sizes, counts, strict=True)
        return np.sum([sizes.costs[:, np.searchsorted(sizes.counts, n)] for sizes, n in pairs], axis=0)

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
        site_sizes = []
        for site, sizes in zip(self.problem.sites, self.problem.site_sizes, strict=True):
            budgets, halves = self.problem.budgets, self.case.halves(site)
            more = np.array([budget.beyond(self.case, site, sizes.counts) for budget in budgets])
            step = sizes.step
            if step is not None:
                more_units = sizes.counts[1] - sizes.counts[0]
                each = [float(budget.layers(self.case, halves)) for budget in budgets]
                step = tuple(cost + float(one * more_units) for cost, one in zip(step, each, strict=True))
            site_sizes.append(replace(sizes, costs=sizes.costs + more, step=step))
        found = solve(site_sizes, self.problem.capacities + self.whole)
        return float("inf") if found is None else found.bound


def solve_products(problem: Problem) -> Solution | None:
    """Return the best choice found whose products meet every budget; `solver.solve` if there are no products.

    Returns None when nothing was found that meets them.
    """
    best = solve(problem.site_sizes, problem.capacities)  # within the budgets by sums is within them
    products = Products(problem)
    if not products or (best and best.counts == list(products.case.units.values())):
        return best
    low, high = 0.0, 0.5  # sums count at most half of a layer too much
    for _ in range(_STEPS):
        share = (low + high) / 2
        found = solve(problem.site_sizes, problem.capacities + share * products.whole)
        if found is not None and not products.fits(found.counts):
            high = share
            continue
        low = share
        if found is not None and (best is None or found.score >= best.score):
            best = found
    if best is None:
        return None
    everything = sum(float(sizes.gains[-1]) for sizes in problem.site_sizes)
    bound = max(min(products.bound(), everything), best.score)
    return replace(best, costs=products.used(best.counts), bound=bound, optimal=False)
