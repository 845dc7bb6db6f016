"""Magnitude: the squared weights of a unit. It needs no data; what a ranking must beat."""

from __future__ import annotations

import numpy as np
from torch import nn

from optin_cli.artefacts.ranking import RankedSite
from optin_cli.scoring.methods.base import Item, ScoringMethod
from optin_cli.structure.anatomy import Anatomy
from optin_cli.structure.layers import matrix


class MagnitudeMethod(ScoringMethod):
    """Reads the weights alone."""

    name = "magnitude"
    needs_data = False
    batches_compare = False

    def items(self) -> list[Item]:
        return []

    def combine(self, sites: list[RankedSite]) -> dict[str, np.ndarray]:
        return magnitude(self.model.module, self.anatomy)


def magnitude(model: nn.Module, anatomy: Anatomy) -> dict[str, np.ndarray]:
    """Sum of the squared weights of a unit (producers' rows, consumer's columns), site -> [units].

    The sum, not the mean: it grows with the unit's cost, so heads and neurons compete on equal terms.
    """
    scores = {}
    for site in anatomy:
        columns = matrix(model.get_submodule(site.consumer)).float().square()  # (outputs, features * taps)
        total = columns.sum(0).view(site.units, columns.shape[1] // max(1, site.units)).sum(1)
        for producer in site.producers:
            rows = matrix(model.get_submodule(producer.path)).float().square().sum(1)
            width = site.rows_of(producer)
            if site.is_base(producer):
                continue  # it goes with none of them alone
            if producer.by_unit:
                total = total + rows.view(site.units, producer.parts * width).sum(1)
            else:
                total = total + rows.view(producer.parts, site.units, width).sum((0, 2))
        scores[site.name] = total.double().cpu().numpy()
    return scores
