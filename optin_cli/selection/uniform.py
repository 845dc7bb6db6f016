"""One size for all layers that one entry of the config sizes, so that the model's own class can build the result.

Sites of one entry become one item of the knapsack: its gain is the sum of what its sites keep, its cost the sum of
theirs. A transformer has two such items, heads and neurons, so that the solver tries every pair of sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from optin_cli.architectures.families import known_families
from optin_cli.artefacts.facts import SizedBy
from optin_cli.artefacts.ranking import RankedSite, Ranking
from optin_cli.errors import UsageError, param
from optin_cli.selection.choices import Ints, Sizes
from optin_cli.selection.problem import Problem, best_sums, out_of_reach
from optin_cli.selection.solver import Solution, solve
from optin_cli.structure.anatomy import RATIO


@dataclass(frozen=True)
class _Item:
    """Sites that are sized together."""

    members: list[int]
    """Indices of the sites."""
    each: list[int]
    """Units of each for one that the item counts."""
    counts: set[int] | None
    """The numbers that the entry can have; None: all."""


def solve_uniform(problem: Problem) -> Solution:
    """The sizes that keep the largest score within the budgets where sites of one entry have the same.

    Its bound is that of uniform choices. Raises `UsageError` for a model whose class can size nothing, `BudgetError`
    where no size is small enough.
    """
    items = _items(problem)
    sizes = [_sizes(problem, item) for item in items]
    found = solve(sizes, problem.capacities)
    if found is None:
        raise out_of_reach(problem, np.sum([one.costs[:, 0] for one in sizes], axis=0))
    counts = [0] * len(problem.sites)
    for item, count in zip(items, found.counts, strict=True):
        for member, each in zip(item.members, item.each, strict=True):
            counts[member] = count * each
    return replace(found, counts=counts)


def with_shared_sizes(problem: Problem) -> Problem:
    """The problem with one score for each unit of sites that have to keep the same ones, the mean over them; and with
    the same ranks for the heads of all layers, where an entry says the width of a head. Raises `UsageError` where
    ranks are asked for and none does.
    """
    problem = _with_shared_scores(problem)
    if not problem.searches_ranks:
        return problem
    sized = sized_by(problem.ranking)
    check_sized(sized, problem.ranking.model["class"], ranks=bool(problem.request.ranks))
    shared = {
        tuple(item.members): _counts(problem, item) for item in _items(problem) if _share_ranks(problem, item)
    }
    return replace(problem, shared_heads=shared)


def _share_ranks(problem: Problem, item: _Item) -> bool:
    """Whether the heads of an item's sites can all have the same lower rank, and no others have that width."""
    sized, sites = sized_by(problem.ranking), [problem.sites[member] for member in item.members]
    entries = {sized[site.name].get("width", "") if site.name in sized else "" for site in sites}
    others = {name for name, by in sized.items() if by.get("width") in entries}
    able = {one.site for one in problem.ranking.rank_sites}
    able &= {site.name for site in sites if problem.knows_ranks(site)}
    alike = len({(site.units, site.width) for site in sites}) == 1 and set(item.each) == {1}
    return alike and "" not in entries and others == {site.name for site in sites} <= able


def _with_shared_scores(problem: Problem) -> Problem:
    shared: dict[str, list[int]] = {}
    sized = sized_by(problem.ranking)
    for index, site in enumerate(problem.sites):
        by = sized.get(site.name)
        if by and "same" in by:
            shared.setdefault(by["same"], []).append(index)
    scores = list(problem.scores)
    for members in shared.values():
        if len(members) > 1 and len({problem.sites[member].units for member in members}) == 1:
            _refuse_exchanges(problem)
            mean = np.mean([problem.scores[member] for member in members], axis=0)
            for member in members:
                scores[member] = mean
    return replace(problem, scores=scores)


def _refuse_exchanges(problem: Problem) -> None:
    if problem.request.interactions != "none":
        raise UsageError(
            f"{param('interactions', problem.request.interactions)} would give blocks different units, and those of a "
            f"uniform {problem.ranking.model['class']} share them",
            f"leave {param('interactions')} out",
        )


def sized_by(ranking: Ranking) -> Mapping[str, SizedBy]:
    """Site -> the entry of the config that sizes it. Rankings from before that was recorded: by the family's table.

    Raises `UsageError` where neither says it.
    """
    recorded = ranking.model.get("config")
    return _by_table(ranking) if recorded is None else recorded


def check_sized(sized: Mapping[str, SizedBy], name: str, *, ranks: bool = False) -> None:
    """Raise `UsageError` for a class of that `name` that can size no site; with `ranks`, no dimensions of heads."""
    if not sized:
        raise UsageError(
            f"{param('uniform', True)} makes a model that its stock class opens, and the config of a {name} says no "
            "sizes of what is pruned",
            f"leave {param('uniform', True)} out",
        )
    if ranks and not any("width" in by for by in sized.values()):
        raise UsageError(
            f"{param('uniform', True)} makes a model that its stock class opens, and the config of a {name} does not "
            "say the width of a head",
            f"leave {param('ranks', True)} out, or {param('uniform', True)}",
        )


def _by_table(ranking: Ranking) -> dict[str, SizedBy]:
    family = next((one for one in known_families() if one.name == ranking.model["family"]), None)
    entries: dict[str, set[tuple[tuple[str, str], ...]]] = {}
    for table in family.sites if family else ():
        entries.setdefault(table.label, set()).add(tuple(table.config.items()))
    plain = all(len(found) == 1 and RATIO not in dict(*found).values() for found in entries.values())
    if family is None or family.streams or not plain:
        raise UsageError(
            f"{param('uniform', True)} needs a ranking that says what a {ranking.model['class']} can have fewer of, "
            "and this one is of an older version",
            "score again",
        )
    first = {label: next(iter(config))[0] for label, (config,) in entries.items() if config}
    labels = {site.name: site.name.rpartition(".")[2] for site in ranking.sites}
    return {name: {"entry": first[label], "each": 1} for name, label in labels.items() if label in first}


def _items(problem: Problem) -> list[_Item]:
    """The sites by entry, in order of their first site; each that nothing sizes is an item of its own."""
    ranking = problem.ranking
    if any(ranking.merges):
        raise UsageError(
            f"{ranking.model['id']} merges tokens, and {param('uniform', True)} makes a model that its stock class "
            "opens, which merges none",
            f"leave {param('uniform', True)} out",
        )
    sized = sized_by(ranking)
    check_sized(sized, ranking.model["class"])
    items: dict[str, _Item] = {}
    for index, site in enumerate(problem.sites):
        by = sized.get(site.name)
        counts = by.get("counts") if by else [site.units]  # what nothing sizes stays whole
        name = by["entry"] if by else site.name
        item = items.setdefault(name, _Item([], [], None if counts is None else set(counts)))
        item.members.append(index)
        item.each.append(by["each"] if by else 1)
    return list(items.values())


def _sizes(problem: Problem, item: _Item) -> Sizes:
    """The sizes that an item may have."""
    sites = [problem.sites[member] for member in item.members]
    if all(site.name in problem.rank_sizes for site in sites):
        return problem.sizes_of_ranks(sites, [problem.rank_sizes[site.name] for site in sites])
    pairs, counts = list(zip(sites, item.each, strict=True)), _counts(problem, item)
    each_scores = [problem.scores[member] for member in item.members]
    gains = np.sum(
        [best_sums(scores)[each * counts] for scores, each in zip(each_scores, item.each, strict=True)], 0
    )
    costs = np.sum([problem.costs(site, each * counts) for site, each in pairs], axis=0)  # [budgets, sizes]
    steps = np.unique(np.diff(counts))
    step = None
    if len(steps) == 1 and all(budget.linear for budget in problem.budgets):
        step = tuple(
            float(sum(budget.unit_cost(problem.case, site) * each for site, each in pairs)) * int(steps[0])
            for budget in problem.budgets
        )
    return problem.without_slower(Sizes(counts, gains, costs, step))


def _counts(problem: Problem, item: _Item) -> Ints:
    """The numbers that an item may count; at least one, since classes can't be built without units."""
    sites = [problem.sites[member] for member in item.members]
    pairs = list(zip(sites, item.each, strict=True))
    allowed = [_allowed(problem, site, each) for site, each in pairs]
    if item.counts is not None:
        allowed.append(item.counts)
    counts = np.array(sorted(set.intersection(*allowed)), np.intp)
    if not len(counts):
        some = ", ".join(f"{site.name} has {site.units} units" for site in sites[:3])
        raise UsageError(
            f"the layers can't have the same size: {some}{' ..' if len(sites) > 3 else ''}",
            f"leave {param('protect')} and other guards out, or {param('uniform', True)}",
        )
    return counts


def _allowed(problem: Problem, site: RankedSite, each: int) -> set[int]:
    """What an item may count, as far as this site goes."""
    there = (int(count) for count in problem.counts(site))
    return {count // each for count in there if (count or not site.units) and count % each == 0}
