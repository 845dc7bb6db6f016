"""Rankings to select from, and what a mask of one costs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from helpers.artefacts import CALIBRATION
from optin_cli.artefacts.ranking import RankedSite, Ranking
from optin_cli.artefacts.site_losses import SiteLosses

FIXED_PARAMS = 5000
WIDTH = 8
"""Of the heads."""


def ranking(
    blocks: int = 3,
    heads: int = 4,
    neurons: int = 20,
    seed: int = 0,
    pruned: float = 1.0,
    widths=(1, 1, 1, 1),
) -> Ranking:
    """A ranking of a made-up model; `pruned` < 1 makes the dense original larger than what is ranked.

    `widths` scales the costs of each block: more than one of them makes more than two unit costs.
    """
    rng = np.random.default_rng(seed)
    sites = []
    for block in range(blocks):
        for kind, units, cost, pair in (("heads", heads, 640, 16), ("neurons", neurons, 64, 0)):
            cost, pair = cost * widths[block], pair * widths[block]
            trajectory = rng.lognormal(0, 1, (units, 2))
            output = rng.lognormal(3, 1, units)
            site = RankedSite(
                f"blocks.{block}.{kind}", kind, block, units, WIDTH, cost, pair, cost + 1, trajectory.sum(1),
                trajectory, output, [1, 2], np.zeros((0, units, 2), np.float32),
            )  # fmt: skip
            sites.append(site)
    site_params = sum(s.units * s.params_per_unit for s in sites) / pruned
    return Ranking(
        model={"digest": "d" * 64, "family": "made-up", "id": "m", "task": "t", "class": "c"},
        data={**CALIBRATION, "row_ids": [0, 1]},
        row_ids=[0, 1],
        method="ablation",
        settings={},
        tokens=10.0,
        dense={
            "id": "m",
            "digest": "d" * 64,
            "params": round(FIXED_PARAMS + site_params),
            "site_params": round(site_params),
            "macs_per_token": sum(s.units * s.macs_per_token for s in sites) / pruned,
            "macs_per_pair": sum(s.units * s.macs_per_pair for s in sites) / pruned,
        },
        sites=sites,
    )


def with_ranks(made: Ranking, seed: int = 0, zero: bool = False) -> Ranking:
    """The same ranking with losses of ranks drawn at random, falling with the rank."""
    rng = np.random.default_rng(seed + 100)
    found = []
    for site in made.sites:
        if site.kind == "heads":
            steps = rng.lognormal(-2, 1, (WIDTH, 2)) * (0 if zero else 1)
            steps[0] += 3 * (not zero)  # most is in the first dimension
            tails = steps[::-1].cumsum(0)[::-1]
            found.append(SiteLosses(site.name, [1, 2], tails, tails.sum(1)))
    return replace(made, rank_sites=found)


def macs_of(made: Ranking, mask, tokens: float = 10.0) -> float:
    return sum(len(mask.keep[s.name]) * s.macs_per_unit(tokens) for s in made.sites)


def params_of(made: Ranking, mask) -> float:
    return FIXED_PARAMS + sum(len(mask.keep[s.name]) * s.params_per_unit for s in made.sites)


def kept(mask) -> dict[str, int]:
    return {name: len(units) for name, units in mask.keep.items()}
