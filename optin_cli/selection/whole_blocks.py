"""Whole blocks: what a ranking by depth is searched for. Each keeps all its units, or what guards hold back alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from optin_cli.errors import UsageError, param
from optin_cli.selection.choices import Sizes
from optin_cli.selection.problem import Problem, best_sums, climbing
from optin_cli.selection.solver import Solution, solve


def solve_whole_blocks(problem: Problem) -> Solution | None:
    """The blocks that keep the largest score within the budgets; None where the smallest choice exceeds one.

    The units of a block are one item of the knapsack, of two sizes. Raises `UsageError` for requests that would part
    them.
    """
    _check(problem)
    blocks: dict[int, list[int]] = {}
    for index, site in enumerate(problem.sites):
        blocks.setdefault(site.block, []).append(index)
    sizes = [_sizes(problem, members) for members in blocks.values()]
    found = solve(sizes, problem.capacities)
    if found is None:
        return None
    counts = [0] * len(problem.sites)
    for members, size in zip(blocks.values(), found.counts, strict=True):
        for member in members:
            counts[member] = int(problem.counts(problem.sites[member])[-size])
    return replace(found, counts=counts)


def _sizes(problem: Problem, members: list[int]) -> Sizes:
    """A block with the fewest units that its sites may have (0), and with all of them (1)."""
    gains, costs = np.zeros(2), np.zeros((len(problem.budgets), 2))
    for member in members:
        site = problem.sites[member]
        ends = problem.counts(site)[[0, -1]]
        gains += best_sums(problem.scores[member])[ends]
        costs += problem.costs(site, ends)
    sizes = np.array([0, 1], np.intp)
    for row, budget in enumerate(problem.budgets):
        if not budget.linear:
            kept = climbing(costs[row])
            sizes, gains, costs = sizes[kept], gains[kept], costs[:, kept]
    step = tuple((costs[:, -1] - costs[:, 0]).tolist()) if len(sizes) > 1 else None
    return Sizes(sizes, gains, costs, step)


def _check(problem: Problem) -> None:
    request, method = problem.request, problem.ranking.method
    parting = {
        "uniform": request.uniform,
        "interactions": request.interactions != "none",
        "tokens": request.merge != "none",
    }
    for name, asked in parting.items():
        if asked:
            raise UsageError(
                f"a {method} ranking keeps or drops whole blocks, and {param(name)} asks for something else",
                f"leave {param(name)} out",
            )
