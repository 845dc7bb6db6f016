"""Wanda-sp: weights times the norms of what they read, as An et al. (AAAI 2024) take Wanda (Sun et al. 2024) to units.

S_j = sum_i |W_ij| ||X_j||_2 of a feature j that the consumer W reads, with X_j its values at all calibration tokens; a
unit's score is the sum over its features.

Its authors compare units within a layer, of which each loses the same share. Here all are compared.
"""

from __future__ import annotations

import numpy as np

from optin_cli.artefacts.ranking import RankedSite
from optin_cli.scoring.methods.features import FeatureMethod


class WandaSpMethod(FeatureMethod):
    """Wanda of units instead of single weights."""

    name = "wanda-sp"

    def combine(self, sites: list[RankedSite]) -> dict[str, np.ndarray]:
        return {site.name: self._score(site) for site in sites}

    def _score(self, site: RankedSite) -> np.ndarray:
        """[units]"""
        found = self.features(site)
        norms = np.sqrt(found.squares * self.calibration.batches.count)
        return (np.abs(found.weights).sum(0) * norms).sum(1)
