"""The base of curvature and ablation: trajectory and output terms, combined by OPTIN's equation 1."""

from __future__ import annotations

import numpy as np

from optin_cli.artefacts.ranking import RankedSite
from optin_cli.importance import AUTO, auto_weighting, combine
from optin_cli.scoring.calibration import measured_blocks
from optin_cli.scoring.methods.base import ScoringMethod
from optin_cli.structure.anatomy import Site


class TrajectoryMethod(ScoringMethod):
    """OPTIN: how much the features of the deeper blocks and the output change without a unit."""

    recombines = True
    output_weight = None
    feature_weights = AUTO

    def columns(self, site: Site) -> list[int]:
        return measured_blocks(site, len(self.anatomy.blocks))

    def combine(self, sites: list[RankedSite]) -> dict[str, np.ndarray]:
        features, weight = auto_weighting({site.kind for site in sites}, self.model.task.name)
        given = self.settings.output_weight
        return combine(sites, weight if given is None else given, features)
