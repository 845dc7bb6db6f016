"""`select`: the mask with the largest kept score that meets every budget and guard of a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import numpy as np

from optin_cli.artefacts.facts import Asked, Objective, Reached
from optin_cli.artefacts.mask import Mask
from optin_cli.artefacts.ranking import Ranking
from optin_cli.artefacts.sketch import Sketch
from optin_cli.errors import UsageError, param
from optin_cli.selection.budgets import BUILT_IN
from optin_cli.selection.coupled_layers import Products, solve_products
from optin_cli.selection.interactions import Rearrangement, as_facts, halves, rearrange
from optin_cli.selection.problem import Problem, out_of_reach, pose
from optin_cli.selection.ranks import whole_units
from optin_cli.selection.settings import Request
from optin_cli.selection.solver import Solution
from optin_cli.selection.token_merging import MergeSolution, merge_tokens
from optin_cli.selection.uniform import sized_by, solve_uniform, with_shared_sizes
from optin_cli.selection.whole_blocks import solve_whole_blocks


def select(ranking: Ranking, request: Request | float, sketch: Sketch | None = None) -> Mask:
    """The best mask within the budgets of `request`; a bare number is a share of the MACs.

    `sketch` is the ranking's: the request's interactions are computed from it.
    Raises `UsageError` for a request no ranking could serve, `ArtefactError` for a latency table that does not
    belong and `BudgetError` naming the smallest budget that can be reached.
    """
    if not isinstance(request, Request):
        request = Request(flops=request)
    problem, merged = pose(ranking, request), None
    solution: Solution | None
    if ranking.settings.get("whole_blocks"):
        solution = solve_whole_blocks(problem)
    elif request.uniform:
        problem = with_shared_sizes(problem)
        solution = solve_uniform(problem)
    elif request.merge == "none":
        solution = solve_products(problem)
    else:
        merged = merge_tokens(problem)
        problem, solution = problem.with_merges(merged.problem.merges), merged.solution
    if solution is None:
        raise out_of_reach(problem)
    mask = _arranged(problem, solution, sketch, merged)
    return _compared(mask, ranking, request, sketch) if request.uniform else mask


def _compared(mask: Mask, ranking: Ranking, request: Request, sketch: Sketch | None) -> Mask:
    """A uniform mask, with what the free one of the same request would keep."""
    ranks = None if request.ranks else request.ranks  # what the ranking lacks was said
    free = select(ranking, replace(request, uniform=False, ranks=ranks), sketch)
    fewer = {site.kind for site in ranking.sites if site.name in sized_by(ranking)}
    mask.objective["free"] = {
        "kept": free.objective["kept"],
        "flops": free.reached["flops"],
        "whole": sorted(ranking.kinds - fewer),
    }
    return mask


def _arranged(
    problem: Problem, solution: Solution, sketch: Sketch | None, merged: MergeSolution | None
) -> Mask:
    """The mask of a solution, its units exchanged for their interactions where that is asked for."""
    keep, ranks = problem.keep(solution.counts), problem.ranks(solution.counts)
    if problem.request.interactions == "none":
        return mask_of(problem, solution, keep, merged=merged, ranks=ranks)
    if sketch is None or not len(sketch):
        raise UsageError(
            "the ranking holds no sketch, and interactions are computed from it",
            f"leave {param('interactions')} out, or score again without "
            f"{param('sketch', False, python='sketch_rows=0')}",
        )
    products, room = Products(problem), problem.capacities
    if products:  # what sums count too much may be used
        room = np.maximum(room, products.summed(solution.counts))
    sizes = problem.sizes_at(solution.counts)
    fit, check = halves(problem.sites, problem.scores, sketch, problem.weighting[0])
    found = rearrange(keep, problem.scores, sizes, room, fit, check, problem.request.interactions)
    if products and not products.fits([len(found.keep[site.name]) for site in problem.sites]):
        return mask_of(problem, solution, keep, merged=merged, ranks=ranks)
    return mask_of(problem, solution, found.keep, found, merged, ranks)


def mask_of(
    problem: Problem,
    solution: Solution,
    keep: Mapping[str, Sequence[int]],
    rearranged: Rearrangement | None = None,
    merged: MergeSolution | None = None,
    ranks: Mapping[str, int] | None = None,
) -> Mask:
    """The mask that keeps `keep`, site name -> ascending units: the solution's own, or others within its budgets.

    `rearranged` says how `keep` came from the solution, where interactions were asked for; `merged` how the schedule
    was found, where tokens were to be merged; `ranks` those of heads that are cut.
    """
    ranking = problem.ranking
    total = sum(float(scores.sum()) for scores in problem.scores) or 1.0
    ranks = dict(ranks or {})
    kept = problem.kept_score(keep, ranks)
    loss = merged.loss if merged else 0.0
    # sums in another order differ in the last digit
    bound = max(merged.bound if merged else solution.bound, kept - loss)
    units = {site.name: site.units for site in problem.sites}
    objective: Objective = {
        "kept": kept / total,
        "bound": bound / total,
        "gap": (bound - kept + loss) / total,
        "optimal": solution.optimal and not merged and not (rearranged and rearranged.moved),
        "merging": loss / total,
        "interactions": as_facts(rearranged) if rearranged else None,
    }
    if not merged:
        del objective["merging"]
    return Mask(
        model_digest=ranking.model["digest"],
        ranking_digest=ranking.digest,
        family=ranking.model["family"],
        budget=_asked(problem),
        reached=reached(problem, {name: len(indices) for name, indices in keep.items()}, ranks),
        objective=objective,
        calibration={**ranking.data, "row_ids": ranking.row_ids[:64]},
        units=units,
        keep={name: list(indices) for name, indices in keep.items()},
        summary={
            name: f"{len(keep[name])}/{count}" + (f" of rank {ranks[name]}" if name in ranks else "")
            for name, count in units.items()
        },
        merges=list(problem.merges) if any(problem.merges) else [],
        ranks=ranks,
    )


def reached(problem: Problem, kept: Mapping[str, int], ranks: Mapping[str, int] | None = None) -> Reached:
    """Return what a model with `kept` units in each site, heads at their `ranks`, uses of the built-in resources, and
    of others asked for."""
    whole = whole_units(kept, ranks or {}, problem.sites)
    others = [budget for budget in problem.budgets if type(budget) not in BUILT_IN]
    case = replace(problem.case, ranks=ranks or {})
    found: dict[str, float] = {}
    for budget in (*(kind(1.0) for kind in BUILT_IN), *others):
        found |= budget.reached(case, whole)
    return cast(Reached, found)


def emptied_sites(mask: Mask) -> list[str]:
    """Sites that lost all their units."""
    return [name for name, kept in mask.keep.items() if not kept and mask.units[name]]


def _asked(problem: Problem) -> Asked:
    request = problem.request
    features, output_weight = problem.weighting
    asked: Asked = {
        "flops": None,
        "params": None,
        "memory": None,
        "latency": None,
        "latency_ms": None,
        "relative_to": request.relative_to,
        "tokens": problem.tokens,
        "output_weight": output_weight,
        "feature_weights": features,
        "interactions": request.interactions,
        "min_heads": request.min_heads,
        "min_neurons": request.min_neurons,
        "min_channels": request.min_channels,
        "max_prune": request.max_prune,
        "protect": list(request.protect),
        "only": request.only,
        "round_to": request.round_to,
        "merge": request.merge,
        "latency_table": request.table.describe() if request.table else None,
    }
    if request.merge == "none":
        del asked["merge"]
    if request.uniform:
        asked["uniform"] = True
    amounts = {budget.key: budget.amount for budget in problem.budgets}
    return cast(Asked, {**asked, **amounts})
