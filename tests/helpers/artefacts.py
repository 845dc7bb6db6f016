"""Rankings, latency tables and masks without a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import strategies as st

from optin_cli.artefacts.latency import LatencyTable, processor_name
from optin_cli.artefacts.ranking import RankedSite, Ranking
from optin_cli.structure.anatomy import Anatomy, Site


def tiny_ranking(blocks: int = 3, heads: int = 4, neurons: int = 6, seed: int = 0, **changes: Any) -> Ranking:
    """A ranking of no model in particular, with positive scores that add up from their parts."""
    rng = np.random.default_rng(seed)
    sites = []
    for block in range(blocks):
        for kind, units, width in (("heads", heads, 8), ("neurons", neurons, 1)):
            columns = list(range(block, blocks))
            trajectory, output = rng.exponential(size=(units, len(columns))), rng.exponential(size=units)
            noise = rng.normal(0, 0.1, units)  # of the one batch against the other
            both = np.stack([trajectory.sum(axis=1), output], axis=-1)  # (units, 2)
            sites.append(
                RankedSite(
                    name=f"blocks.{block}.{kind}",
                    kind=kind,
                    block=block,
                    units=units,
                    width=width,
                    macs_per_token=4 * 32 * width if kind == "heads" else 64,
                    macs_per_pair=2 * width if kind == "heads" else 0,
                    params_per_unit=4 * 32 * width + 3 * width if kind == "heads" else 65,
                    score=trajectory.sum(axis=1) + output,
                    trajectory=trajectory,
                    output=output,
                    columns=columns,
                    by_batch=np.stack([both + noise[:, None], both - noise[:, None]]).astype(np.float32),
                )
            )
    facts = {
        "model": {
            "id": "tiny",
            "digest": "m" * 64,
            "family": "bert",
            "task": "embedding",
            "class": "BertModel",
        },
        "data": {name: value for name, value in CALIBRATION.items() if name != "row_ids"},
        "row_ids": [1, 4, 9],
        "method": "curvature",
        "settings": {"seed": 0, "probes": 4, "lambda": 1.0},
        "tokens": 11.5,
        "dense": {
            "id": "tiny",
            "digest": "m" * 64,
            "params": 10_000,
            "macs_per_token": sum(s.units * s.macs_per_token for s in sites),
            "macs_per_pair": sum(s.units * s.macs_per_pair for s in sites),
            "site_params": sum(s.units * s.params_per_unit for s in sites),
        },
        "batch_weights": [0.5, 0.5],
        "versions": {"optin": "0.1.0"},
        "created": "2025-01-31T12:00:00",
        "seconds": 1.5,
    }
    return Ranking(**{**facts, "sites": sites, **changes})


ASKED = {
    "flops": 0.6, "params": None, "memory": None, "latency": None, "latency_ms": None, "relative_to": "dense",
    "tokens": 11.5, "output_weight": 0.3, "feature_weights": "sum", "interactions": "none", "min_heads": 0,
    "min_neurons": 0, "min_channels": 0, "max_prune": 1.0, "protect": [], "only": None, "round_to": "auto",
    "latency_table": None,
}  # fmt: skip
REACHED = {
    "flops": 0.598, "macs": 598.0, "dense_macs": 1000.0, "params": 420, "dense_params": 700, "memory": 0.0016,
    "dense_memory": 0.0027,
}  # fmt: skip
OBJECTIVE = {"kept": 0.97, "bound": 0.971, "gap": 0.001, "optimal": True, "interactions": None}
CALIBRATION = {
    "spec": "data.csv", "config": None, "split": "train", "text": ["sentence"], "image": None, "label": "label",
    "fingerprint": "f" * 64, "rows": 60, "row_ids": [1, 4],
}  # fmt: skip


def latency_table(
    sites: Iterable[RankedSite | Site], step: int = 1, ranks: Sequence[float] = (), **setting: Any
) -> LatencyTable:
    """A made-up table of a model with these sites; neurons cost a stair of `step` units, heads a line.

    `ranks` are the shares of that line that heads of 4, 8, .. dimensions cost, the last of them whole ones.
    """
    curves, facts = [], {}
    for index, site in enumerate(sites):
        counts = np.arange(site.units + 1)
        steps = counts if site.kind == "heads" else -(-counts // step) * step
        curves.append(
            {"counts": counts.tolist(), "ms": (0.001 * site.params_per_unit * steps).tolist(), "noise": 0.0}
        )
        if ranks and site.kind == "heads":
            ms = [[share * one for one in curves[-1]["ms"]] for share in ranks]
            dimensions = [4 * n for n in range(1, len(ranks) + 1)]
            curves[-1]["ranks"] = {"ranks": dimensions, "counts": counts.tolist(), "ms": ms}
        facts[site.name] = {"kind": site.kind, "units": site.units, "curve": index}
    here = {
        "device": "cpu",
        "processor": processor_name(),
        "threads": 1,
        "dtype": "float32",
        "batch_size": 8,
        "size": 16,
    }
    table = LatencyTable(
        model={"id": "m", "digest": "d" * 64, "dense_digest": "d" * 64, "family": "made-up"},
        setting={**here, **setting},
        total_ms=1.0,
        fixed_ms=1.0,
        curves=curves,
        sites=facts,
    )
    table.total_ms = table.model_ms({name: site["units"] for name, site in facts.items()})
    return table


def keep_sets(anatomy: Anatomy) -> st.SearchStrategy[dict[str, list[int]]]:
    """Any kept units of any sites: none, one, some or all of each; a site may be left out (so it stays whole)."""
    return st.fixed_dictionaries({}, optional={site.name: kept_of(site.units) for site in anatomy})


def kept_of(units: int) -> st.SearchStrategy[list[int]]:
    """Ascending indices below `units`; none and just one come up often."""
    every = list(range(units))
    some = st.lists(st.sampled_from(every), unique=True, max_size=units).map(sorted) if units else st.just([])
    one = st.sampled_from(every).map(lambda unit: [unit]) if units else st.just([])
    return st.one_of(st.just([]), one, some, st.just(every))


CHAIN, TAPS = (5, 6, 4), 9
"""Channels of three sites in a chain, and the taps of each layer."""
_ENDS = 3, 2  # channels that go in and come out


def chain_ranking(seed: int, units: tuple[int, ...] = CHAIN) -> Ranking:
    """A ranking of sites in a chain, 3 -> `units` -> 2 channels: layers stand between two of them."""
    ranking = tiny_ranking(blocks=3, heads=0, neurons=1, seed=seed, tokens=2.0)
    rng = np.random.default_rng(seed)
    sites = [site for site in ranking.sites if site.kind == "neurons"]
    sizes = (_ENDS[0], *units, _ENDS[1])
    for index, site in enumerate(sites, 1):
        site.kind, site.units, site.score = "channels", sizes[index], rng.exponential(size=sizes[index])
        ends = [(sizes[index - 1], index > 1), (sizes[index + 1], index < len(sites))]
        cost = sum(TAPS * size / (2 if shared else 1) for size, shared in ends)
        site.macs_per_token = site.params_per_unit = cost
        site.macs_per_pair = 0
    ranking.sites = sites
    ranking.model["shared"] = [
        {"made": made.name, "read": read.name, "macs_per_token": TAPS, "params": TAPS}
        for read, made in pairwise(sites)
    ]
    whole = chain_cost(units)
    ranking.dense |= {
        "macs_per_token": whole,
        "macs_per_pair": 0,
        "site_params": whole,
        "params": whole + 100,
    }
    return ranking


def chain_cost(kept: Iterable[int]) -> int:
    """MACs of a token with so many channels."""
    return TAPS * sum(a * b for a, b in pairwise((_ENDS[0], *kept, _ENDS[1])))
