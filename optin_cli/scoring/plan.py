"""The plan of a scoring run: the model, its calibration batches, the method and its settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from optin_cli.artefacts.facts import LengthFacts
from optin_cli.artefacts.files import digest_json
from optin_cli.data.examples import Examples
from optin_cli.data.lengths import text_lengths
from optin_cli.data.opening import open_batches
from optin_cli.data.sources import DataSpec
from optin_cli.execution.rotation import check_rankable, rankable, with_turned_heads
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.loading.processors import most_positions
from optin_cli.scoring.calibration import Calibration
from optin_cli.scoring.labels import read_labels
from optin_cli.scoring.methods.base import ScoringMethod
from optin_cli.scoring.methods.registry import check_scores, configured, method_named
from optin_cli.scoring.settings import ScoreSettings
from optin_cli.scoring.sublayers import normed_sublayers
from optin_cli.scoring.token_merging import check_mergeable
from optin_cli.structure.anatomy import SUBLAYERS
from optin_cli.structure.layers import replaces_forward

_LEAST_WIDTH = 16
"""Dimensions of a head from which its ranks, multiples of 4 or 8, are measured by default."""
Progress = Callable[[float, float, str], None]
"""Called with (work done, all work, what is being done)."""


@dataclass
class Plan:
    """Everything `score` needs. Made by `make_plan`."""

    model: OpenModel
    examples: Examples
    calibration: Calibration
    settings: ScoreSettings
    """With the defaults of their method."""
    labels: list[Any] | None = None
    """One for each row of the data, for the methods that need them."""

    @property
    def method(self) -> type[ScoringMethod]:
        return method_named(self.settings.method)

    @property
    def lengths(self) -> LengthFacts | None:
        """The lengths of the calibration's texts; None for other data."""
        config = getattr(self.model.module, "config", None)
        return text_lengths(self.calibration.batches, most_positions(config))

    def identity(self) -> dict[str, Any]:
        """Return the facts that make two scoring runs the same work."""
        settings = asdict(self.settings)
        settings.pop("output_weight")  # parts are stored apart, so lambda never means scoring again
        if not self.settings.tokens:  # a ranking that has them, too, serves
            settings.pop("tokens")
        if not self.settings.ranks:
            settings.pop("ranks")
        if self.settings.strata is None:  # every block has a pass of its own, as ever
            settings.pop("strata")
        if self.model.merges:
            settings["merges"] = self.model.merges
        if any(site.one_group for site in self.model.anatomy):  # once all heads of a block were one unit
            settings["query_heads"] = True
        scored = self.calibration.model.anatomy
        if any(site.kind == SUBLAYERS for site in scored):  # once they were not measured
            settings["sublayers"] = True
        return {
            "model": self.model.digest,
            "data": self.examples.fingerprint,
            "rows": digest_json(self.examples.row_ids),
            "family": self.model.family.name,
            "task": self.model.task.name,
            "dtype": self.model.dtype_name,
            **self.method.facts(self.model),
            **settings,
        }


def worth_ranks(method: type[ScoringMethod], model: OpenModel) -> bool:
    """Whether lower ranks of heads are measured by default: where they can be, and there are some to choose from."""
    able = method.takes_ranks and not replaces_forward(model.module)
    return able and any(site.width >= _LEAST_WIDTH for site in rankable(model))


def make_plan(model: OpenModel, data: DataSpec, settings: ScoreSettings, memory: int | None = None) -> Plan:
    """Open the data and fix the calibration; `memory` bounds the engines in bytes. Raises what data and settings
    raise."""
    settings = configured(settings)
    method = method_named(settings.method)
    settings = replace(
        settings,
        strata=method.shared_passes(settings.strata, len(model.anatomy.blocks)),
        ranks=worth_ranks(method, model) if settings.ranks is None else settings.ranks,
    )
    check_scores(method, model)
    if settings.tokens:
        check_mergeable(model.anatomy, model.spec)
    if settings.ranks:
        check_rankable(model)
    batches = open_batches(
        data,
        model,
        settings.samples,
        settings.batch_size,
        settings.seed,
        max_length=settings.max_length,
        together=method.needs_labels,
        # PTF's batches are random: texts of one length are more alike
        shuffle=settings.seed if method.shuffled or settings.per_batch else None,
    )
    labels = read_labels(model, batches, method.name) if method.needs_labels else None
    scored = model
    if settings.ranks:  # the same function; `model` stays as it is
        scored = with_turned_heads(model, batches)
        scored = replace(scored, anatomy=scored.anatomy.with_dimensions())
    if method.takes_sublayers and len(model.devices) == 1:  # ablation needs the model on one
        one = batches[0].head(1).to(scored.device, scored.dtype)
        with scored.unmerged():
            normed = normed_sublayers(scored, one)
        scored = replace(scored, anatomy=scored.anatomy.with_sublayers(normed))
    calibration = Calibration(
        scored, batches, settings.rows, settings.temperature or method.temperature, settings.seed, memory
    )
    return Plan(model, batches.examples, calibration, settings, labels)
