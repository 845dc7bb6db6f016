"""FLAP: how much what a consumer reads fluctuates around its mean (An et al., AAAI 2024).

S_j = Var(X_j) ||W_j||_2^2 of a feature j, with X_j its values at all calibration tokens and W_j the consumer's column
that reads it: what is left of the error once a bias makes up for the mean. In each layer these are standardised,
(S - mean) / deviation, so that layers compare; a unit's is the mean over its features.

FLAP cuts at one threshold of all layers, chosen so that what is left has the wanted size. The search of masks weighs
scores against MACs: so a unit's score is its distance from the lowest, times its MACs, and the cut is the same.
"""

from __future__ import annotations

import numpy as np

from optin_cli.artefacts.ranking import RankedSite
from optin_cli.scoring.calibration import mean_tokens
from optin_cli.scoring.methods.features import FeatureMethod


class FlapMethod(FeatureMethod):
    """FLAP's weighted input feature variance, standardised (WIFV, with its adaptive structure)."""

    name = "flap"

    def combine(self, sites: list[RankedSite]) -> dict[str, np.ndarray]:
        tokens = mean_tokens(self.calibration)
        metric = {site.name: self._standardised(site) for site in sites}
        lowest = min((float(units.min()) for units in metric.values() if len(units)), default=0.0)
        return {site.name: (metric[site.name] - lowest) * site.macs_per_unit(tokens) for site in sites}

    def _standardised(self, site: RankedSite) -> np.ndarray:
        """[units]"""
        found = self.features(site)
        if not site.units:
            return np.zeros(0)
        variance = np.maximum(found.squares / found.tokens - (found.sums / found.tokens) ** 2, 0)
        metric = variance * np.square(found.weights).sum(0)  # (units, width)
        deviation = metric.std()
        return ((metric - metric.mean()) / (deviation if deviation > 0 else 1.0)).mean(1)
