"""Settings of a mask: budgets, guards, and how scores and costs are combined."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from optin_cli.artefacts.latency import LatencyTable, processor_name
from optin_cli.artefacts.ranking import RankedSite, Ranking
from optin_cli.errors import ArtefactError, UsageError, param
from optin_cli.importance import (
    AUTO,
    NAMED_WEIGHTS,
    OPTIN_SUM,
    FeatureWeights,
    auto_weighting,
    measured_depth,
    own_output_weight,
)
from optin_cli.selection.budget import Budget
from optin_cli.selection.budgets import BUILT_IN, Latency, Macs, Memory, Params

ROUND_AUTO = "auto"
SCOPES = ("none", "layer", "global")
TOKEN_SEARCHES = ("none", "only", "joint")
_WIDE = ("heads",)
"""Kinds that a `round_to` of so many units does not round: their units are wide already."""
CPU_FEATURES = 8
_GPU_FEATURES = {"float16": 64, "bfloat16": 64}
_GPU_FEATURES_OTHERWISE = 32
"""The multiple of features that `auto` keeps on a CPU, which loads so many numbers at once, and on a GPU: rows of 128
bytes, float32 as TF32 too."""
_FEWEST_STEPS = {"heads": 4}
_FEWEST_STEPS_OTHERWISE = 8
"""Sizes that `auto` leaves a site to choose from, at least: a narrow layer is rounded less."""
_LOADS = 8
"""A GPU's tensor cores load so many parts of such a row, of 16 bytes each: `auto` rounds to no less than one. On a CPU
a layer too narrow for its multiple is not rounded."""


def token_fields(tokens: str | float | None, name: str = "tokens") -> dict[str, Any]:
    """Fields of a `Request` that one value sets: how tokens are merged, or the length that MACs are counted for."""
    if tokens is None or tokens in TOKEN_SEARCHES:
        return {"merge": tokens} if tokens else {}
    try:
        return {"tokens": float(tokens)}
    except ValueError as error:
        raise UsageError(
            f"{param(name, meta=repr(tokens))} is neither a way to merge tokens nor a length",
            f"use {', '.join(TOKEN_SEARCHES)}, or a number of tokens",
        ) from error


@dataclass(frozen=True)
class Request:
    """At least one budget; all of them hold together. The defaults hold nothing back."""

    flops: float | None = None
    """Share of the MACs of all sites to keep."""
    params: float | None = None
    """Share of the model's parameters to keep, embeddings and all."""
    memory: float | None = None
    """MiB of weights, as stored."""
    latency: float | None = None
    """Share of the latency that `table` gives the whole model."""
    latency_ms: float | None = None
    budgets: tuple[Budget, ...] = ()
    """Further budgets, of any kind."""
    table: LatencyTable | None = field(
        default=None,
        metadata={
            "name": "latency_table",
            "metavar": "FILE.json",
            "help": "Made by `optin bench MODEL --table`; also predicts the latency under other budgets.",
        },
    )
    min_heads: int = field(
        default=0, metadata={"panel": "Selection", "help": "Heads every layer keeps at least."}
    )
    min_neurons: int = field(
        default=0, metadata={"panel": "Selection", "help": "Neurons every layer keeps at least."}
    )
    min_channels: int = field(
        default=0, metadata={"panel": "Selection", "help": "Channels every site of a CNN keeps at least."}
    )
    max_prune: float = field(
        default=1.0,
        metadata={
            "panel": "Selection",
            "flag": "max-prune-per-layer",
            "metavar": "FRACTION",
            "help": "Largest share of a layer's heads, and of its neurons, that may go.",
        },
    )
    protect: tuple[str, ...] = field(
        default=(),
        metadata={
            "panel": "Selection",
            "metavar": "GLOB",
            "help": "Keep matching sites whole, e.g. 'blocks.0.*'; may be repeated.",
        },
    )
    only: str | None = field(
        default=None,
        metadata={
            "panel": "Selection",
            "metavar": "KIND",
            "help": "Prune units of one kind alone: heads, neurons or channels.",
        },
    )
    round_to: int | str = field(
        default=ROUND_AUTO,
        metadata={
            "panel": "Selection",
            "metavar": "N|auto",
            "help": "Keep neurons of a layer in multiples of 8, 16, 32 or 64; 1 for any number; auto picks by device "
            "and dtype.",
        },
    )
    """Channels, too; a site of fewer is kept whole. `auto` rounds heads, too."""
    output_weight: float | None = field(
        default=None,
        metadata={
            "panel": "Selection",
            "flag": "lambda",
            "help": "Recombine the scores with another weight of the output term.",
        },
    )
    """lambda of OPTIN equation 1; None takes the stored scores."""
    feature_weights: str | tuple[float, ...] | None = field(
        default=None,
        metadata={
            "panel": "Selection",
            "metavar": "NAME|W,W,...",
            "help": "Weigh the blocks' features in the scores: auto (by the budget), sum (OPTIN), fourth-root, root, "
            "mean, deep, last, or one for each block.",
        },
    )
    """None takes those of the ranking."""
    interactions: str = field(
        default="none",
        metadata={
            "panel": "Selection",
            "metavar": "SCOPE",
            "help": "Then exchange units so that they cost less together: within a layer, global, or none.",
        },
    )
    relative_to: str = field(
        default="dense",
        metadata={"help": "Shares of the original `dense` or of the `current` model."},
    )
    tokens: float | None = field(
        default=None,
        metadata={
            "metavar": "MODE|LENGTH",
            "help": "Merge tokens of a vision transformer: joint with heads and neurons, only tokens, or none "
            "(default). A number is the sequence length that MACs are counted for (default: calibration mean).",
        },
    )
    """The number; the word is `merge`."""
    merge: str = "none"
    """Merge tokens for the MACs budget: `joint` with the units, `only` tokens, or `none` but what the model merges."""
    ranks: bool | None = field(
        default=None,
        metadata={
            "panel": "Selection",
            "switch": True,
            "help": "Cut heads to lower ranks, too: fewer dimensions in each head of a layer.",
        },
    )
    """None: where the ranking says what that costs."""
    uniform: bool = field(
        default=False,
        metadata={
            "panel": "Selection",
            "help": "Keep as many heads and as many neurons in every layer, so that the model's stock class opens the "
            "result: without optin and without remote code.",
        },
    )
    force: bool = False
    """Take a latency table of another device or dtype."""

    @cached_property
    def asked(self) -> tuple[Budget, ...]:
        """All budgets: the built-in ones, then those in `budgets`."""
        named = (
            None if self.flops is None else Macs(self.flops),
            None if self.params is None else Params(self.params),
            None if self.memory is None else Memory(self.memory),
            None if self.latency is None else Latency(self.latency),
            None if self.latency_ms is None else Latency(self.latency_ms, ms=True),
        )
        return (*(budget for budget in named if budget), *self.budgets)

    def with_budgets(self, budgets: Iterable[Budget]) -> Request:
        """The same request with these budgets in place of all others."""
        named: dict[str, Any] = dict.fromkeys(key for kind in BUILT_IN for key in kind.entries())
        further = []
        for budget in budgets:
            if type(budget) in BUILT_IN and named[budget.key] is None:
                named[budget.key] = budget.amount
            else:
                further.append(budget)
        return replace(self, **named, budgets=tuple(further))

    def check(self) -> None:
        """Raise `UsageError` for what no ranking could serve: to be called before anything expensive."""
        for budget in self.asked:
            budget.check(self.table)
        if not self.asked:
            raise UsageError(
                "no budget is given",
                f"use {param('flops')}, {param('params')}, {param('latency')} or {param('memory')}",
            )
        keys = [budget.key for budget in self.asked]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise UsageError(f"two budgets are given for {', '.join(sorted(twice))}", "leave one out")
        if min(self.min_heads, self.min_neurons, self.min_channels) < 0:
            raise UsageError(
                f"{param('min_heads')}, {param('min_neurons')} and {param('min_channels')} can't be negative"
            )
        if not 0 <= self.max_prune <= 1:
            raise UsageError(
                f"{param('max_prune', float(self.max_prune))} is not a share", "give one in [0, 1]"
            )
        if self.round_to != ROUND_AUTO and (isinstance(self.round_to, str) or self.round_to < 1):
            raise UsageError(param("round_to", self.round_to), "give 8, 16, 32, 64 or auto")
        self._check_merging()
        self._check_uniform()
        if self.relative_to not in ("dense", "current"):
            raise UsageError(param("relative_to", self.relative_to), "use dense or current")
        if self.tokens is not None and not 0 < self.tokens < math.inf:
            raise UsageError(f"{param('tokens', float(self.tokens))}: a sequence has at least one token")
        if self.output_weight is not None and not 0 <= self.output_weight < math.inf:
            raise UsageError(
                f"{param('output_weight', float(self.output_weight))} is not a weight", "give 0 or more"
            )
        if self.interactions not in SCOPES:
            raise UsageError(param("interactions", self.interactions), f"use {', '.join(SCOPES)}")
        self._check_feature_weights()

    @property
    def cuts_ranks(self) -> bool | None:
        """Whether heads may be cut to lower ranks; None: where the ranking says what that costs.

        A budget that is not linear may know whole heads alone, and so may a latency table.
        """
        return False if self.ranks is None and not self.knows_ranks else self.ranks

    @property
    def knows_ranks(self) -> bool:
        """Whether every budget can tell what lower ranks of heads cost."""
        times = self.table is None or self.table.knows_ranks()
        return times and all(budget.knows_ranks(self.table) for budget in self.asked)

    def _check_merging(self) -> None:
        if self.merge not in TOKEN_SEARCHES:
            raise UsageError(param("tokens", self.merge), f"use {', '.join(TOKEN_SEARCHES)}")
        if self.merge == "none":
            return
        if not any(isinstance(budget, Macs) for budget in self.asked):
            raise UsageError(
                f"{param('tokens', self.merge)} saves MACs, and no budget of MACs is given",
                f"give {param('flops')}, too",
            )
        for budget in self.asked:
            if budget.whole_sequences:
                raise UsageError(
                    f"{param(budget.entries()[0])} can't be met with {param('tokens', self.merge)}: "
                    f"{budget.whole_sequences}",
                    "leave one out",
                )

    def _check_uniform(self) -> None:
        if self.uniform and self.merge != "none":
            raise UsageError(
                f"{param('uniform', True)} makes a model that its stock class opens, and none merges tokens",
                f"leave {param('tokens', self.merge)} out, or {param('uniform', True)}",
            )
        if self.uniform and self.interactions == "global":
            raise UsageError(
                f"{param('interactions', 'global')} moves units between layers, and with {param('uniform', True)} all "
                "layers have the same number",
                f"use {param('interactions', 'layer')}",
            )

    def _check_feature_weights(self) -> None:
        weights = self.feature_weights
        if isinstance(weights, str) and weights not in NAMED_WEIGHTS:
            way_out = f"use {', '.join(NAMED_WEIGHTS)}, or a weight for each block as 0,0.5,1"
            raise UsageError(param("feature_weights", weights), way_out)
        if isinstance(weights, tuple) and not (all(0 <= w < math.inf for w in weights) and sum(weights) > 0):
            raise UsageError(
                param("feature_weights", meta=",".join(f"{w:g}" for w in weights)),
                "give weights of 0 or more, not all 0",
            )

    def check_sites(self, sites: Collection[RankedSite]) -> None:
        """Raise `UsageError` for a glob or a kind that no site has."""
        for glob in self.protect:
            if not any(fnmatchcase(site.name, glob) for site in sites):
                names = ", ".join([site.name for site in sites][:3])
                raise UsageError(
                    f"{param('protect', meta=repr(glob))} matches no site", f"sites are named like {names}"
                )
        kinds = sorted({site.kind for site in sites})
        if self.only is not None and self.only not in kinds:
            raise UsageError(
                f"{param('only', self.only)}: the ranking has no such units", f"it has {', '.join(kinds)}"
            )

    def keeps_whole(self, site: RankedSite) -> bool:
        """Whether nothing of `site` may go."""
        return self.only not in (None, site.kind) or any(fnmatchcase(site.name, g) for g in self.protect)

    def minimum(self, site: RankedSite) -> int:
        """Units of `site` that must stay."""
        if self.keeps_whole(site):
            return site.units
        least = {
            "heads": self.min_heads,
            "neurons": self.min_neurons,
            "channels": self.min_channels,
        }.get(site.kind, 0)
        # a share such as 0.9 is not exact: 10 units may lose 9, whatever 10 * (1 - 0.9) is in floats
        share = math.ceil(site.units * (1 - self.max_prune) - 1e-9)
        return min(max(least, share), site.units)

    def multiple(self, site: RankedSite, size: int) -> int:
        """Return the multiple that the units of `site` are rounded to; `size` is that of `round_size`.

        With `auto` the features of a site, units * width, come in multiples of `size`, or of a power of two below it
        where that left too few sizes to choose from.
        """
        if self.round_to != ROUND_AUTO:
            return 1 if site.kind in _WIDE else size
        steps = _FEWEST_STEPS.get(site.kind, _FEWEST_STEPS_OTHERWISE)
        on_cpu = size <= CPU_FEATURES
        least = size if on_cpu else max(1, size // _LOADS)
        while size > least and steps * _units_of(size, site) > site.units:
            size //= 2
        units = _units_of(size, site)
        return 1 if (on_cpu or site.kind in _WIDE) and steps * units > site.units else units


def _units_of(features: int, site: RankedSite) -> int:
    """The fewest units whose features are a multiple of `features`."""
    return features // math.gcd(features, max(1, site.width))


def weighting(request: Request, ranking: Ranking, share: float) -> tuple[FeatureWeights, float]:
    """Return the weights of the parts of scores, (feature weights, lambda): as asked, else as the ranking has it.

    What neither says, or says to be `auto`, follows `share`: what the tightest budget leaves. Raises `UsageError` for a
    wrong number of weights.
    """
    weights, output_weight = request.feature_weights, request.output_weight
    if output_weight is None and weights != AUTO:
        output_weight = ranking.settings.get("output_weight")
    if weights is None:
        weights = ranking.settings.get("feature_weights", OPTIN_SUM)
    if weights == AUTO:
        weights, found = auto_weighting(ranking.kinds, ranking.model["task"], share)
    else:
        found = own_output_weight(ranking)
    if output_weight is None:
        output_weight = found
    depth = measured_depth(ranking.sites)
    if not isinstance(weights, str) and len(weights) != depth:
        raise UsageError(
            f"{param('feature_weights')} has {len(weights)} weights for {depth} blocks", "give one for each"
        )
    return weights, float(output_weight)


def round_size(request: Request, ranking: Ranking) -> int:
    """`round_to` with `auto` resolved, to a number of features, for the table's device and dtype, or else for the
    ranking's device and the dtype of the model's weights.

    A GPU's matrix products run in tiles and load rows of 128 bytes: 64 numbers in half precision, 32 in float32. Other
    sizes take kernels that can be slower than those of the dense model. A CPU takes up to 14 % longer for odd sizes
    (benchmarks/speed.py).
    """
    if request.round_to != ROUND_AUTO:
        return int(request.round_to)
    if request.table:
        device, dtype = request.table.setting["device"], request.table.setting["dtype"]
    else:  # scores are computed in float32 whatever is stored; the model runs in what is stored
        device, dtype = ranking.device, str(ranking.dense.get("dtype", ranking.dtype))
    if device.startswith("cpu"):
        return CPU_FEATURES
    return _GPU_FEATURES.get(dtype, _GPU_FEATURES_OTHERWISE)


def check_table(
    table: LatencyTable, device: str, dtype: str, units: Mapping[str, int], *, force: bool = False
) -> None:
    """Raise `ArtefactError` unless `table` was made for this device, dtype and these sites (name -> units).

    `force` accepts another device or dtype, never other sites: there is nothing to count those with. A table of
    the dense model serves what was pruned from it: its curves start at no unit.
    """
    again = "make one with `optin bench MODEL --table FILE.json`"
    there = {name: site["units"] for name, site in table.sites.items()}
    missing = [name for name, count in units.items() if there.get(name, -1) < count]
    if missing or set(table.sites) - set(units):
        odd = [*missing, *sorted(set(table.sites) - set(units))][0]
        raise ArtefactError(
            f"the latency table is of a model of another shape ({table.model['id']}): {odd} has "
            f"{there.get(odd, 0)} units there, {units.get(odd, 0)} here",
            again,
        )
    here = device.partition(" (")[0]
    processor = processor_name() if here == "cpu" else ""
    found = table.setting
    for what, wanted, have in (
        ("device", here, found["device"]),
        ("dtype", dtype, found["dtype"]),
        ("processor", processor, found["processor"]),
    ):
        if wanted != have and not force:
            raise ArtefactError(
                f"the latency table is of another {what}: measured on {have}, and this is {wanted}",
                f"{again}; or {param('force', True)}, if the pruned model is to run there",
            )


def scored_for(requests: Iterable[Request]) -> dict[str, Any]:
    """Settings of scoring for what a ranking must say to serve the requests: what merges cost, and lower ranks."""
    asked = list(requests)
    cuts = {request.cuts_ranks for request in asked}
    ranks = True if True in cuts else None if None in cuts else False
    return {"tokens": any(request.merge != "none" for request in asked), "ranks": ranks}
