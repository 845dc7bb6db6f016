"""Merging tokens, `joint` and `only`: from a posed problem to the schedule of merges, and the sizes that go with it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from optin_cli.artefacts.ranking import Ranking
from optin_cli.errors import UsageError, param
from optin_cli.importance import OPTIN_SUM, FeatureWeights, column_weights, measured_depth, output_scale
from optin_cli.selection.budgets import Macs
from optin_cli.selection.choices import Floats
from optin_cli.selection.problem import Problem, out_of_reach
from optin_cli.selection.solver import Solution, solve
from optin_cli.selection.token_schedules import (
    Boundaries,
    Pricing,
    Schedule,
    ScheduleCandidates,
    search_schedules,
)

_SOLVED = 4
"""Candidates whose sizes are solved for exactly, beside those that every search must not fall behind."""


@dataclass(frozen=True)
class MergeSolution:
    """The problem with its schedule, the sizes, the loss of merging, and a bound on the net score."""

    problem: Problem
    solution: Solution
    loss: float
    bound: float
    """No schedule and sizes keep more score less losses."""


def boundaries_of(problem: Problem) -> Boundaries:
    """The measured losses, for every count: straight lines between those measured, never falling.

    Raises `UsageError` when the ranking has none.
    """
    ranking, request = problem.ranking, problem.request
    depth = len(problem.seen)
    if [one.block for one in ranking.token_sites] != list(range(depth - 1)) or depth < 2:
        raise UsageError(
            f"{param('tokens', request.merge)}: the ranking does not say what merging tokens costs",
            "score again with `optin score --tokens`",
        )
    losses, (features, weight) = [], problem.weighting
    for one, measured in zip(ranking.token_sites, merge_losses(ranking, weight, features), strict=True):
        counts, rising = [0, *one.counts], np.maximum.accumulate([0.0, *measured])
        losses.append(np.interp(np.arange(counts[-1] + 1), counts, rising))
    return Boundaries(round(ranking.tokens), ranking.model.get("prefix", 0), depth, tuple(losses))


def merge_losses(
    ranking: Ranking, output_weight: float, feature_weights: FeatureWeights = OPTIN_SUM
) -> list[Floats]:
    """The loss of each measured count at each boundary, on the scale of `combine`: the units' lambda."""
    depth = measured_depth(ranking.sites)
    scale = output_weight * output_scale(ranking.sites, feature_weights) if output_weight else 0.0
    return [
        (one.trajectory * column_weights(one.columns, depth, feature_weights)).sum(axis=1)
        + scale * one.output
        for one in ranking.token_sites
    ]


def merge_tokens(problem: Problem) -> MergeSolution:
    """The best schedule found for the request's `merge`, never worse than none and, if joint, than tokens alone.

    Raises `BudgetError` when no schedule meets the budgets.
    """
    boundaries = boundaries_of(problem)
    none = (0,) * (boundaries.depth - 1)
    whole = problem.with_whole_sites()
    only = _searched(whole, boundaries, [none])
    if problem.request.merge == "only":
        return _best(whole, boundaries, only, [none])
    starts = [none, only.schedules[0]]
    if any(problem.merges) and boundaries.allows(already := _padded(problem.merges, none)):
        starts.append(already)
    return _best(problem, boundaries, _searched(problem, boundaries, starts), starts)


def _padded(merges: Schedule, none: Schedule) -> Schedule:
    return (*merges, *none)[: len(none)]


def _searched(problem: Problem, boundaries: Boundaries, starts: list[Schedule]) -> ScheduleCandidates:
    room = float(problem.capacities[_macs_row(problem)])
    return search_schedules(Pricing(problem.sites, problem.site_sizes, boundaries, room), starts)


def _best(
    problem: Problem, boundaries: Boundaries, searched: ScheduleCandidates, starts: list[Schedule]
) -> MergeSolution:
    """The candidate that is best once its sizes are solved for."""
    found: list[MergeSolution] = []
    for schedule in dict.fromkeys([*searched.schedules[:_SOLVED], *starts]):
        merged = problem.with_merges(schedule)
        if (solution := solve(merged.site_sizes, merged.capacities)) is not None:
            loss = boundaries.loss(schedule)
            found.append(MergeSolution(merged, solution, loss, max(searched.bound, solution.score - loss)))
    if not found:  # the search has raised the price of MACs until nothing else counted
        tried = [problem.with_merges(schedule) for schedule in searched.schedules]
        raise out_of_reach(min(tried, key=lambda one: float(one.least[_macs_row(one)])))
    return max(found, key=lambda one: one.solution.score - one.loss)


def _macs_row(problem: Problem) -> int:
    return next(row for row, budget in enumerate(problem.budgets) if isinstance(budget, Macs))
