"""From a ranking and a request to the sizes and budgets that the solver takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from optin_cli.artefacts.ranking import RankedSite, Ranking
from optin_cli.errors import BudgetError, UsageError, param
from optin_cli.importance import (
    OPTIN_SUM,
    FeatureWeights,
    combine,
    losses,
    own_output_weight,
    scored_with,
    with_whole,
)
from optin_cli.selection.budget import Budget, Case
from optin_cli.selection.choices import Floats, Ints, Sizes
from optin_cli.selection.ranks import STEP, RankSizes, rank_losses, rank_sizes, searched_ranks
from optin_cli.selection.settings import CPU_FEATURES, ROUND_AUTO, Request, check_table, round_size, weighting


@dataclass(frozen=True)
class Problem:
    """Everything that decides a mask."""

    ranking: Ranking
    request: Request
    sites: list[RankedSite]
    scores: list[Floats]
    """[units] for each site."""
    merges: tuple[int, ...] = ()
    """Tokens merged behind each block."""
    weighting: tuple[FeatureWeights, float] = (OPTIN_SUM, 0.0)
    """The weights that the scores were combined with: (feature weights, lambda)."""
    searches_ranks: bool = False
    """Heads may be cut to lower ranks."""
    shared_heads: Mapping[tuple[int, ...], Ints] | None = None
    """Indices of sites of heads that have the same number and rank -> the numbers to choose from; sites that are not
    there keep whole heads. None: each site has its own."""

    @property
    def budgets(self) -> tuple[Budget, ...]:
        return self.request.asked

    @cached_property
    def case(self) -> Case:
        """The facts that the costs of units depend on."""
        dense = self.request.relative_to == "dense"
        return Case(self.ranking, self.sites, self.tokens, self.seen, dense, self.request.table)

    @cached_property
    def seen(self) -> list[float]:
        """Tokens that each block sees."""
        return self.ranking.tokens_by_block(self.tokens, self.merges)

    def with_merges(self, merges: tuple[int, ...]) -> Problem:
        """The same request with another schedule of merges."""
        return replace(self, merges=merges)

    def with_whole_sites(self) -> Problem:
        """The same budgets with every unit kept."""
        return replace(self, request=replace(self.request, protect=("*",)))

    @property
    def tokens(self) -> float:
        return self.request.tokens or self.ranking.tokens

    @cached_property
    def round_size(self) -> int:
        return round_size(self.request, self.ranking)

    @cached_property
    def site_sizes(self) -> list[Sizes]:
        return [self._sizes(site, scores) for site, scores in zip(self.sites, self.scores, strict=True)]

    @cached_property
    def capacities(self) -> Floats:
        """[budgets]: what the sites may use of each."""
        return np.array([budget.capacity(self.case) for budget in self.budgets])

    @property
    def share(self) -> float:
        """Return the share that the tightest budget leaves of the ranked sites."""
        whole = np.sum([self.costs(site, np.array([site.units]))[:, 0] for site in self.sites], axis=0)
        return float(np.min(self.capacities / np.maximum(whole, 1e-300), initial=1.0))

    @property
    def least(self) -> Floats:
        """[budgets]: what the smallest sizes use of each."""
        return np.sum([sizes.costs[:, 0] for sizes in self.site_sizes], axis=0)

    @cached_property
    def rank_sizes(self) -> dict[str, RankSizes]:
        """Site of heads -> numbers of heads and ranks to choose from; empty where heads stay whole."""
        if not self.searches_ranks:
            return {}
        features, output_weight = self.weighting
        of_ranks = rank_losses(self.ranking, output_weight, features)
        groups = self.shared_heads
        if groups is None:
            groups = {
                (index,): self.counts(site)
                for index, site in enumerate(self.sites)
                if site.name in of_ranks and self.knows_ranks(site)
            }
        found: dict[str, RankSizes] = {}
        for members, counts in groups.items():
            sites = [self.sites[index] for index in members]
            scores, losses = [self.scores[index] for index in members], [of_ranks[s.name] for s in sites]
            price = self._price(sites)
            found |= rank_sizes(sites, scores, losses, counts, self.request, self.rank_step, price)
        return found

    def knows_ranks(self, site: RankedSite) -> bool:
        """Whether it is known what lower ranks of a site's heads take."""
        return self.request.table is None or self.request.table.knows_ranks(site.name)

    def _price(self, sites: Sequence[RankedSite]) -> Callable[[Ints, Ints], Floats] | None:
        """What (heads, ranks) of some sites use of the first budget that is not linear; None: all are."""
        budget = next((one for one in self.budgets if not one.linear), None)
        if budget is None:
            return None
        return lambda *sizes: np.sum([budget.rank_costs(self.case, site, *sizes) for site in sites], axis=0)

    @property
    def rank_step(self) -> int:
        """The multiple that ranks come in."""
        if self.request.round_to == ROUND_AUTO:  # attention kernels of a GPU like larger ones
            return 2 * STEP if self.round_size > CPU_FEATURES else STEP
        return max(STEP, self.round_size)

    def keep(self, counts: list[int]) -> dict[str, list[int]]:
        """The best units of each site for a choice of sizes, indices ascending; ties go to the lower index."""
        units = (self._choice(site, n)[0] for site, n in zip(self.sites, counts, strict=True))
        best = (np.sort(np.argsort(-s, kind="stable")[:n]) for s, n in zip(self.scores, units, strict=True))
        return {site.name: found.tolist() for site, found in zip(self.sites, best, strict=True)}

    def ranks(self, counts: list[int]) -> dict[str, int]:
        """Site -> rank of the heads that stay, where a choice of sizes cuts them."""
        found = {s.name: (s.width, *self._choice(s, n)) for s, n in zip(self.sites, counts, strict=True)}
        return {name: rank for name, (width, units, rank) in found.items() if units and rank < width}

    def kept_score(self, keep: Mapping[str, Sequence[int]], ranks: Mapping[str, int]) -> float:
        """The score that stays."""
        total = 0.0
        for site, scores in zip(self.sites, self.scores, strict=True):
            kept = float(scores[keep[site.name]].sum())
            sizes = self.rank_sizes.get(site.name)
            total += kept * (sizes.share(ranks[site.name]) if sizes and site.name in ranks else 1.0)
        return total

    def sizes_at(self, counts: list[int]) -> list[Sizes]:
        """The sizes of all sites where heads that may be cut keep their number and rank: they are counted in heads."""
        found = []
        for site, sizes, count in zip(self.sites, self.site_sizes, counts, strict=True):
            if site.name in self.rank_sizes:
                at = [int(np.searchsorted(sizes.counts, count))]
                heads = np.array([self._choice(site, count)[0]])
                sizes = Sizes(heads, sizes.gains[at], sizes.costs[:, at])
            found.append(sizes)
        return found

    def _choice(self, site: RankedSite, count: int) -> tuple[int, int]:
        """(units, dimensions of each) of a size."""
        sizes = self.rank_sizes.get(site.name)
        return sizes.at(count) if sizes else (count, site.width)

    def _sizes(self, site: RankedSite, scores: Floats) -> Sizes:
        if ranked := self.rank_sizes.get(site.name):
            return self.sizes_of_ranks([site], [ranked])
        counts = self.counts(site)
        costs = self.costs(site, counts)
        steps = np.unique(np.diff(counts))
        step = None
        based = counts[0] == 0 and any(budget.base_cost(self.case, site) for budget in self.budgets)
        if len(steps) == 1 and not based and all(budget.linear for budget in self.budgets):
            step = tuple(float(budget.unit_cost(self.case, site)) * int(steps[0]) for budget in self.budgets)
        return self.without_slower(Sizes(counts, best_sums(scores)[counts], costs, step))

    def sizes_of_ranks(self, sites: Sequence[RankedSite], each: Sequence[RankSizes]) -> Sizes:
        """The sizes of sites whose heads have the same number and rank."""
        gains, costs = np.sum([one.gains for one in each], axis=0), []
        for budget in self.budgets:
            used = (
                budget.rank_costs(self.case, s, one.heads, one.ranks)
                for s, one in zip(sites, each, strict=True)
            )
            costs.append(np.sum(list(used), axis=0))
        sizes = self.without_slower(Sizes(each[0].counts, gains, np.array(costs), width=each[0].width))
        kept = np.arange(len(sizes.counts))
        for row in sizes.costs:  # in the order of their times, (heads, ranks) are not in that of their MACs
            kept = kept[climbing(row[kept])]
        if len(kept) == len(sizes.counts):
            return sizes
        least = np.minimum.accumulate(sizes.costs[:, ::-1], axis=1)[:, ::-1]
        return replace(_some(sizes, kept), relaxed=replace(sizes, costs=least))

    def without_slower(self, sizes: Sizes) -> Sizes:
        """Sizes without those that use more than a larger one of a budget that is not linear."""
        for row, budget in enumerate(self.budgets):
            if not budget.linear:
                sizes = _some(sizes, climbing(sizes.costs[row]))
        return sizes

    def counts(self, site: RankedSite) -> Ints:
        """The numbers of units that guards and rounding allow; all of them always are."""
        chained = site.name in self.ranking.model.get("chained", ())  # something must pass
        least = max(self.request.minimum(site), min(1, site.units) if chained else 0)
        multiple = self.request.multiple(site, self.round_size)
        sizes = np.arange(-(-least // multiple) * multiple, site.units + 1, multiple)
        return sizes if len(sizes) and sizes[-1] == site.units else np.append(sizes, site.units)

    def costs(self, site: RankedSite, counts: Ints | Floats) -> Floats:
        """[budgets, counts]: what so many units use of each budget."""
        return np.array([budget.costs(self.case, site, counts) for budget in self.budgets])


def pose(ranking: Ranking, request: Request) -> Problem:
    """Check a request against a ranking and lay it out. Raises `UsageError` and `ArtefactError`."""
    request.check()
    request.check_sites(ranking.sites)
    if request.table is not None:
        units = {site.name: site.units for site in ranking.sites}
        check_table(request.table, ranking.device, ranking.dtype, units, force=request.force)
    sites = sorted(ranking.sites, key=lambda s: (s.block, s.kind))
    problem = Problem(ranking, request, sites, [], tuple(ranking.merges))
    own = scored_with(ranking), own_output_weight(ranking)
    chosen = weighting(request, ranking, problem.share) if _check_parts(ranking, request) else own
    scores = [site.score for site in sites]
    if chosen != own:
        combined = combine(sites, chosen[1], chosen[0])
        scores = [combined[site.name] for site in sites]
    whole = losses(ranking, ranking.sublayers, chosen[1], chosen[0])
    scores = [
        with_whole(found, float(whole[site.name][0])) if site.name in whole and site.units else found
        for site, found in zip(sites, scores, strict=True)
    ]
    ranked = searched_ranks(request, ranking)
    return replace(problem, scores=scores, weighting=chosen, searches_ranks=ranked)


def _check_parts(ranking: Ranking, request: Request) -> bool:
    """Return whether scores can be combined with other weights. Raises `UsageError` if that is asked for in vain."""
    parts = ranking.settings.get("recombines", True) and all(s.columns for s in ranking.sites if s.units)
    if not parts and (request.output_weight is not None or request.feature_weights is not None):
        option = param("output_weight" if request.feature_weights is None else "feature_weights")
        raise UsageError(
            f"a {ranking.method} ranking has no parts to recombine",
            f"leave {option} out, or score with {param('method', meta='curvature')}",
        )
    return bool(parts)


def best_sums(scores: Floats) -> Floats:
    """[units + 1]: the score of the best 0, 1, 2 .. units."""
    return np.concatenate([[0.0], np.cumsum(-np.sort(-scores))])


def _some(sizes: Sizes, which: Ints) -> Sizes:
    return replace(sizes, counts=sizes.counts[which], gains=sizes.gains[which], costs=sizes.costs[:, which])


def climbing(ms: Floats) -> Ints:
    """Return the sizes above which no larger one is faster: a size that is slower than a larger one is never chosen."""
    return np.flatnonzero(ms <= np.minimum.accumulate(ms[::-1])[::-1])


def out_of_reach(problem: Problem, least: Floats | None = None) -> BudgetError:
    """The error that names every budget that the smallest mask exceeds, and what could be asked for.

    `least` [budgets] is what the smallest mask uses, by default that of the smallest sizes.
    """
    least = problem.least if least is None else least
    over = [
        (budget, budget.show(problem.case, used))
        for budget, used, room in zip(problem.budgets, least, problem.capacities, strict=True)
        if used > room
    ]
    asked = " ".join(f"{budget.asked} can't be met: what must stay takes {shown}." for budget, shown in over)
    smallest = " ".join(budget.said(shown) for budget, shown in over)
    guarded = any(len(sizes.counts) == 1 or sizes.counts[0] > 0 for sizes in problem.site_sizes)
    relax = (
        f"relax {param('min_heads')}, {param('min_neurons')}, {param('min_channels')}, {param('protect')} or other "
        "guards to go lower"
    )
    if problem.request.merge == "only":
        relax = f"{param('tokens', 'joint')} goes lower, since it prunes units, too"
    return BudgetError(
        asked.removesuffix("."),
        f"the smallest budget that can be reached is {smallest}" + (f"; {relax}" if guarded else ""),
    )
