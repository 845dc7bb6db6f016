"""The methods of scoring: who measures what, and how the parts make a score."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from optin_cli.artefacts.ranking import RankedSite, combine
from optin_cli.artefacts.weighting import AUTO, OPTIN_SUM, auto_weighting
from optin_cli.models.anatomy import CHANNELS, HEADS, NEURONS, Site
from optin_cli.scoring import knowledge, reference
from optin_cli.scoring.calibration import measured_blocks

if TYPE_CHECKING:
    from optin_cli.scoring.plan import ScoreSettings

Combine = Callable[[list[RankedSite], "ScoreSettings"], dict[str, np.ndarray]]


def _trajectory_and_output(sites: list[RankedSite], settings: ScoreSettings) -> dict[str, np.ndarray]:
    features, weight = auto_weighting({site.kind for site in sites})
    return combine(sites, weight if settings.output_weight is None else settings.output_weight, features)


def _output_alone(sites: list[RankedSite], _: ScoreSettings) -> dict[str, np.ndarray]:
    return {site.name: site.output for site in sites}


def _no_columns(_: Site, __: int) -> list[int]:
    return []


@dataclass(frozen=True)
class Method:
    """One value of `--method`."""

    engines: Mapping[str, str] = field(default_factory=dict)
    """Which engine scores which kind of unit; empty for methods that need no data."""
    columns: Callable[[Site, int], list[int]] = measured_blocks
    """(site, number of blocks) -> the block that each trajectory column is about."""
    combine: Combine = _trajectory_and_output
    """Ranked sites with their parts -> score of each."""
    recombines: bool = False
    """`select --lambda` may weigh trajectory and output anew, as OPTIN does."""
    output_weight: float | None = 0.0
    """Default of `--lambda`; 0 where there is nothing to weigh, None where the budget decides."""
    feature_weights: str = OPTIN_SUM
    """Default of `--feature-weights`."""
    temperature: float = 4.0
    """Default of `--temperature`."""
    labels: bool = False
    shuffled: bool = False
    """Its batches are drawn, not made of texts of one length."""


def _optin(heads: str, neurons: str) -> Method:
    engines = {HEADS: heads, NEURONS: neurons, CHANNELS: neurons}
    return Method(engines, recombines=True, output_weight=None, feature_weights=AUTO)


METHODS = {
    "curvature": _optin("curvature", "curvature"),
    "ablation": _optin("ablation", "ablation"),
    "mixed": _optin("ablation", "curvature"),
    "fisher": Method(
        {HEADS: "fisher", NEURONS: "fisher", CHANNELS: "fisher"}, _no_columns, _output_alone, labels=True
    ),
    "knowledge": Method(
        {HEADS: "knowledge", NEURONS: "knowledge"},
        knowledge.own_column,
        lambda sites, s: knowledge.combine(sites, s.output_weight or 0.0, s.head_weight),
        output_weight=knowledge.REPRESENTATIONAL_WEIGHT,
        temperature=knowledge.TEMPERATURE,
    ),
    "reference": Method(
        {HEADS: "reference", NEURONS: "reference"},
        combine=lambda sites, s: reference.combine(sites, s.output_weight or 0.0),
        output_weight=reference.LAMBDA,
        shuffled=True,
    ),
    "magnitude": Method(),
    "random": Method(),
}
