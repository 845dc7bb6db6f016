"""Random: scores in proportion to what a unit costs. It needs no data; what a ranking must beat."""

from __future__ import annotations

import numpy as np

from optin_cli.artefacts.ranking import RankedSite
from optin_cli.scoring.calibration import mean_tokens
from optin_cli.scoring.methods.base import Item, ScoringMethod


class RandomMethod(ScoringMethod):
    """Draws uniform scores and multiplies them by each unit's MACs."""

    name = "random"
    needs_data = False
    batches_compare = False

    def items(self) -> list[Item]:
        return []

    def combine(self, sites: list[RankedSite]) -> dict[str, np.ndarray]:
        rng, tokens = np.random.default_rng(self.settings.seed), mean_tokens(self.calibration)
        return {site.name: rng.random(site.units) * site.macs_per_unit(tokens) for site in sites}
