"""From a ranking and a request to the ladders and budgets that the solver takes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from optin_cli.artefacts.ranking import RankedSite, Ranking
from optin_cli.errors import ArtefactError, BudgetError, UsageError
from optin_cli.importance import OPTIN_SUM, FeatureWeights, combine, own_output_weight, scored_with
from optin_cli.selection.ladder import Floats, Ints, Ladder
from optin_cli.selection.request import Request, check_table, round_size, weighting
from optin_cli.selection.shared_latency import predicted_ms

MIB = 2**20
_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "int8": 1}


@dataclass(frozen=True)
class Budget:
    """One budget: the sites may use `capacity`, in MACs, parameters, bytes or milliseconds."""

    what: str
    """MACs, parameters, memory or latency."""
    option: str
    """As it was asked."""
    capacity: float
    """The whole allowance less `fixed`."""
    fixed: float
    """What the model uses outside its sites, where the budget counts that."""
    unit: float
    """One in the option's terms: the dense total of a share, 2**20 bytes of a MiB, a millisecond."""
    suffix: str = ""

    def told(self, used: float) -> str:
        """A use of the sites in the option's terms, rounded up so that it can be asked for."""
        return f"{math.ceil((self.fixed + used) / self.unit * 1e4) / 1e4:.4f}{self.suffix}"


@dataclass(frozen=True)
class Problem:
    """Everything that decides a mask."""

    ranking: Ranking
    request: Request
    sites: list[RankedSite]
    scores: list[Floats]
    """[units] for each site."""
    budgets: list[Budget]
    merges: tuple[int, ...] = ()
    """Tokens merged behind each block."""
    weighting: tuple[FeatureWeights, float] = (OPTIN_SUM, 0.0)
    """How the scores were put together: (feature weights, lambda)."""

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
    def ladders(self) -> list[Ladder]:
        return [self._ladder(site, scores) for site, scores in zip(self.sites, self.scores, strict=True)]

    @property
    def capacities(self) -> Floats:
        return np.array([budget.capacity for budget in self.budgets])

    @property
    def share(self) -> float:
        """What the tightest budget leaves of the ranked sites."""
        whole = np.sum([self._costs(site, np.array([site.units]))[:, 0] for site in self.sites], axis=0)
        return float(np.min(self.capacities / np.maximum(whole, 1e-300), initial=1.0))

    @property
    def least(self) -> Floats:
        """[budgets]: what the smallest sizes use of each."""
        return np.sum([ladder.costs[:, 0] for ladder in self.ladders], axis=0)

    def keep(self, counts: list[int]) -> dict[str, list[int]]:
        """The best `counts` units of each site, indices ascending; ties go to the lower index."""
        best = (np.sort(np.argsort(-s, kind="stable")[:n]) for s, n in zip(self.scores, counts, strict=True))
        return {site.name: units.tolist() for site, units in zip(self.sites, best, strict=True)}

    def _ladder(self, site: RankedSite, scores: Floats) -> Ladder:
        counts = self._sizes(site)
        prefix = np.concatenate([[0.0], np.cumsum(-np.sort(-scores))])
        costs = self._costs(site, counts)
        steps = np.unique(np.diff(counts))
        step = tuple((self._unit_costs(site) * steps[0]).tolist()) if len(steps) == 1 else None
        for row, budget in enumerate(self.budgets):
            if budget.what == "latency":
                kept, step = _climbing(costs[row]), None
                counts, costs = counts[kept], costs[:, kept]
        return Ladder(counts, prefix[counts], costs, step)

    def _sizes(self, site: RankedSite) -> Ints:
        """The numbers of units that guards and rounding allow; all of them always are."""
        chained = site.name in self.ranking.model.get("chained", ())  # something must pass
        least = max(self.request.minimum(site), min(1, site.units) if chained else 0)
        multiple = self.request.multiple(site, self.round_size)
        sizes = np.arange(-(-least // multiple) * multiple, site.units + 1, multiple)
        return sizes if len(sizes) and sizes[-1] == site.units else np.append(sizes, site.units)

    def _costs(self, site: RankedSite, counts: Ints) -> Floats:
        """[budgets, counts]: what so many units use of each budget."""
        costs = self._unit_costs(site)[:, None] * counts
        for row, budget in enumerate(self.budgets):
            if budget.what == "latency":
                assert self.request.table is not None
                costs[row] = self.request.table.site_ms(site.name, counts)
        return costs

    def _unit_costs(self, site: RankedSite) -> Floats:
        """[budgets]: what one unit uses of each; latency comes from its curve."""
        costs = {
            "MACs": site.macs_per_unit(self.seen[site.block]),
            "parameters": site.params_per_unit,
            "memory": site.params_per_unit * stored_bytes(self.ranking),
        }
        return np.array([float(costs.get(budget.what, 0.0)) for budget in self.budgets])


def pose(ranking: Ranking, request: Request) -> Problem:
    """Check a request against a ranking and lay it out. Raises `UsageError` and `ArtefactError`."""
    request.check()
    request.check_sites(ranking.sites)
    if request.table is not None:
        units = {site.name: site.units for site in ranking.sites}
        check_table(request.table, ranking.device, ranking.dtype, units, force=request.force)
    sites = sorted(ranking.sites, key=lambda s: (s.block, s.kind))
    problem = Problem(ranking, request, sites, [], _budgets(ranking, request), tuple(ranking.merges))
    own = scored_with(ranking), own_output_weight(ranking)
    chosen = weighting(request, ranking, problem.share) if _check_parts(ranking, request) else own
    scores = [site.score for site in sites]
    if chosen != own:
        combined = combine(sites, chosen[1], chosen[0])
        scores = [combined[site.name] for site in sites]
    return replace(problem, scores=scores, weighting=chosen)


def stored_bytes(ranking: Ranking) -> int:
    """Bytes of one stored parameter: of the weights on disk where the ranking says, else as it computed."""
    return _BYTES[str(ranking.dense.get("dtype", ranking.dtype))]


def fixed_params(ranking: Ranking) -> int:
    """Parameters outside the sites: embeddings, norms, biases, the task head."""
    return int(ranking.dense["params"] - ranking.dense["site_params"])


def _check_parts(ranking: Ranking, request: Request) -> bool:
    """Whether scores can be put together anew. Raises `UsageError` where they were asked to be and can't."""
    parts = ranking.settings.get("recombines", True) and all(s.columns for s in ranking.sites if s.units)
    if not parts and (request.output_weight is not None or request.feature_weights is not None):
        option = "--lambda" if request.feature_weights is None else "--feature-weights"
        raise UsageError(
            f"a {ranking.method} ranking has no parts to recombine",
            f"leave {option} out, or score with --method curvature",
        )
    return bool(parts)


def _budgets(ranking: Ranking, request: Request) -> list[Budget]:
    tokens, dense = request.tokens or ranking.tokens, request.relative_to == "dense"
    found = []
    if request.flops is not None:
        macs = ranking.dense_macs(tokens) if dense else ranking.macs(tokens)
        found.append(Budget("MACs", f"--flops {request.flops:g}", request.flops * macs, 0.0, macs))
    if request.params is not None or request.memory is not None:
        fixed, size = fixed_params(ranking), stored_bytes(ranking)
        whole = ranking.dense["params"] if dense else fixed + _site_params(ranking)
        if request.params is not None:
            room = request.params * whole - fixed
            found.append(Budget("parameters", f"--params {request.params:g}", room, fixed, whole))
        if request.memory is not None:
            room = request.memory * MIB - fixed * size
            found.append(Budget("memory", f"--memory {request.memory:g}", room, fixed * size, MIB))
    if request.latency is not None or request.latency_ms is not None:
        found += _latency_budgets(ranking, request)
    return found


def _latency_budgets(ranking: Ranking, request: Request) -> list[Budget]:
    table = request.table
    assert table is not None
    fixed, found = table.fixed_ms, []
    if request.latency is not None:
        if request.relative_to == "dense" and table.model["digest"] != table.model["dense_digest"]:
            raise ArtefactError(
                f"the latency table is of the pruned {table.model['id']}: it can't tell shares of the dense model",
                "make one of the dense model, or use --relative-to current",
            )
        here = {site.name: site.units for site in ranking.sites}
        whole = table.total_ms if request.relative_to == "dense" else predicted_ms(ranking, table, here)
        option = f"--latency {request.latency:g}"
        found.append(Budget("latency", option, request.latency * whole - fixed, fixed, whole))
    if request.latency_ms is not None:
        option = f"--latency {request.latency_ms:g}ms"
        found.append(Budget("latency", option, request.latency_ms - fixed, fixed, 1.0, "ms"))
    return found


def _site_params(ranking: Ranking) -> float:
    return sum(site.units * site.params_per_unit for site in ranking.sites)


def _climbing(ms: Floats) -> Ints:
    """Rungs above which no larger one is faster: a size that is slower than a larger one is no choice."""
    return np.flatnonzero(ms <= np.minimum.accumulate(ms[::-1])[::-1])


def out_of_reach(problem: Problem) -> BudgetError:
    """The error that names every budget that the smallest mask exceeds, and what could be asked for."""
    over = [
        (b, b.told(used)) for b, used in zip(problem.budgets, problem.least, strict=True) if used > b.capacity
    ]
    asked = " ".join(f"{budget.option} can't be met: what must stay takes {told}." for budget, told in over)
    smallest = " ".join(f"{budget.option.split()[0]} {told}" for budget, told in over)
    guarded = any(len(ladder.counts) == 1 or ladder.counts[0] > 0 for ladder in problem.ladders)
    relax = "relax --min-heads, --min-neurons, --min-channels, --protect or other guards to go lower"
    if problem.request.merge == "only":
        relax = "--tokens joint goes lower, since it prunes units, too"
    return BudgetError(
        asked.removesuffix("."),
        f"the smallest budget that can be reached is {smallest}" + (f"; {relax}" if guarded else ""),
    )
