"""Latency of layers between two sites: what a table predicts, and budgets that are used up. FLOPs stand in for time."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from helpers.artefacts import chain_cost, chain_ranking
from helpers.flops import flop_counter
from helpers.models import saved_model

from optin_cli.artefacts.latency import LatencyTable
from optin_cli.artefacts.ranking import Ranking
from optin_cli.loading.checkpoint import open_model
from optin_cli.measure import latency_table
from optin_cli.measure.inputs import dummy_inputs
from optin_cli.selection.coupled_latency import predicted_ms
from optin_cli.selection.select import select
from optin_cli.selection.settings import Request
from optin_cli.transforms.slicing import slice_model

FIXED = 7.0


def table_of(ranking: Ranking) -> LatencyTable:
    """A millisecond for each MAC, and `FIXED` more."""
    curves = [
        {"counts": [0, s.units], "ms": [0.0, s.units * s.macs_per_token], "noise": 0.0} for s in ranking.sites
    ]
    sites = {s.name: {"kind": s.kind, "units": s.units, "curve": i} for i, s in enumerate(ranking.sites)}
    facts = {"id": "m", "digest": "d", "dense_digest": "d", "family": "f"}
    units = [s.units for s in ranking.sites]
    setting = {
        "device": "cpu",
        "processor": "p",
        "threads": 1,
        "dtype": "float32",
        "batch_size": 1,
        "size": 2,
    }
    return LatencyTable(facts, setting, FIXED + chain_cost(units), FIXED, curves, sites)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("budget", [0.15, 0.3, 0.5, 0.7, 0.9])
def test_a_chain_uses_its_latency(seed, budget):
    ranking = chain_ranking(seed)
    table, units = table_of(ranking), [site.units for site in ranking.sites]
    mask = select(ranking, Request(latency=budget, table=table, force=True))
    kept = [len(mask.keep[site.name]) for site in ranking.sites]
    allowed = budget * table.total_ms
    assert mask.reached["latency_ms"] == pytest.approx(FIXED + chain_cost(kept))
    assert mask.reached["latency_ms"] <= allowed + 1e-9

    def score(counts) -> float:
        return sum(np.sort(s.score)[::-1][:n].sum() for s, n in zip(ranking.sites, counts, strict=True))

    fitting = [
        counts
        for counts in itertools.product(*(range(n + 1) for n in units))
        if FIXED + chain_cost(counts) <= allowed
    ]
    best, total = max(map(score, fitting)), sum(site.score.sum() for site in ranking.sites)
    assert score(kept) <= best + 1e-9
    assert best <= mask.objective["bound"] * total + 1e-9
    by_sums = [c for c in fitting if table.model_ms(kept_of(ranking, c)) <= allowed]
    assert score(kept) >= max(map(score, by_sums)) - 1e-9


def kept_of(ranking: Ranking, counts) -> dict[str, int]:
    return dict(zip((site.name for site in ranking.sites), counts, strict=True))


def test_more_is_kept_than_sums_allow():
    ranking = chain_ranking(0)
    table = table_of(ranking)
    mask = select(ranking, Request(latency=0.5, table=table, force=True))
    assert table.model_ms({name: len(units) for name, units in mask.keep.items()}) > 0.5 * table.total_ms


def test_a_table_of_the_dense_model_serves_what_was_pruned_from_it():
    dense, pruned = chain_ranking(0), chain_ranking(0, units=(4, 3, 4))
    for counts in itertools.product((1, 4), (2, 3), (1, 4)):
        assert predicted_ms(pruned, table_of(dense), kept_of(pruned, counts)) == pytest.approx(
            FIXED + chain_cost(counts)
        )


@pytest.mark.parametrize("name", ["timm-vgg-bn", pytest.param("timm-resnet", marks=pytest.mark.slow)])
def test_a_measured_table_predicts_sliced_models(name, monkeypatch):
    def flops(call, device=None) -> float:
        with flop_counter() as counter:
            call()
        return float(counter.get_total_flops())

    monkeypatch.setattr(latency_table, "call_ms", flops)
    model = open_model(str(saved_model(name)), device="cpu")
    table = latency_table.make_table(model, 2, 32, repeats=1, seconds=0.0)
    ranking = chain_ranking(0)
    ranking.sites = [copy.copy(ranking.sites[0]) for _ in model.anatomy]
    for ranked, site in zip(ranking.sites, model.anatomy, strict=True):
        ranked.name, ranked.units, ranked.macs_per_token = site.name, site.units, site.macs_per_token
    ranking.model["shared"] = [vars(layer) for layer in model.anatomy.coupled]
    inputs, rng = dummy_inputs(model, 2, 32), np.random.default_rng(0)
    for _ in range(3):
        kept = {site.name: int(rng.integers(site.units // 4 + 1, site.units + 1)) for site in model.anatomy}
        smaller = copy.deepcopy(model.module)
        slice_model(smaller, model.anatomy, {name: range(count) for name, count in kept.items()})
        with torch.inference_mode():
            true = flops(lambda smaller=smaller: smaller(**inputs))
        found = predicted_ms(ranking, table, kept)
        assert found == pytest.approx(true, rel=0.03)
        assert table.model_ms(kept) - true > 2 * abs(found - true)
