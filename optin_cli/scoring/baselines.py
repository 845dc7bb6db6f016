"""Scores that need no data: weight magnitude and random. What a ranking must beat."""

from __future__ import annotations

import numpy as np
from torch import nn

from optin_cli.models.anatomy import Anatomy


def magnitude(model: nn.Module, anatomy: Anatomy) -> dict[str, np.ndarray]:
    """Sum of the squared weights of a unit (producers' rows, consumer's columns), site -> [units].

    The sum, not the mean: it grows with the unit's cost, so heads and neurons compete on equal terms.
    """
    scores = {}
    for site in anatomy:
        consumer = model.get_submodule(site.consumer)
        assert isinstance(consumer, nn.Linear)
        total = consumer.weight.float().square().sum(0).view(site.units, site.width).sum(1)
        for producer in site.producers:
            linear = model.get_submodule(producer.path)
            assert isinstance(linear, nn.Linear)
            rows = linear.weight.float().square().sum(1)
            total = total + rows.view(producer.parts, site.units, site.width).sum((0, 2))
        scores[site.name] = total.double().cpu().numpy()
    return scores


def random_scores(anatomy: Anatomy, tokens: float, seed: int) -> dict[str, np.ndarray]:
    """Uniform random scores in proportion to each unit's MACs, site -> [units]."""
    rng = np.random.default_rng(seed)
    return {site.name: rng.random(site.units) * site.macs_per_unit(tokens) for site in anatomy}
