"""Which units stand near the cut of a budget: only there does a more exact score change the mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from optin_cli.structure.anatomy import Site


def near_the_cut(
    sites: Sequence[Site], scores: Mapping[str, np.ndarray], flops: float, band: float, tokens: float
) -> dict[str, np.ndarray]:
    """Units of each site whose rank in score per MAC is within `band` (a share of all units) of the last one kept.

    `flops` is the share of the MACs that is kept; returns site name -> unit indices.
    """
    owners = np.concatenate([np.full(s.units, i) for i, s in enumerate(sites)])
    units = np.concatenate([np.arange(s.units) for s in sites])
    costs = np.concatenate([np.full(s.units, s.macs_per_unit(tokens)) for s in sites])
    order = np.argsort(-np.concatenate([scores[s.name] for s in sites]) / costs, kind="stable")
    cut = int(np.searchsorted(np.cumsum(costs[order]), flops * costs.sum(), side="right"))
    reach = int(np.ceil(band * len(order)))
    near = order[max(0, cut - reach) : cut + reach]
    return {site.name: np.sort(units[near][owners[near] == i]) for i, site in enumerate(sites)}
