"""Layers between two sites: budgets hold for products, are used up, and the bound is one. Brute force is the oracle."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from helpers.artefacts import CHAIN as UNITS
from helpers.artefacts import TAPS
from helpers.artefacts import chain_cost as cost_of
from helpers.artefacts import chain_ranking as chain
from helpers.data import tiny_image_folder
from helpers.models import saved_model

from optin_cli.architectures.resolve import dissect
from optin_cli.data.sources import DataSpec
from optin_cli.loading.checkpoint import open_model
from optin_cli.scoring import score as scoring
from optin_cli.scoring.plan import ScoreSettings, make_plan
from optin_cli.selection.select import select
from optin_cli.selection.settings import Request
from optin_cli.transforms.slicing import slice_model


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_chain_uses_its_budget(seed, budget):
    ranking = chain(seed)
    mask = select(ranking, Request(flops=budget))
    kept = [len(mask.keep[site.name]) for site in ranking.sites]
    assert cost_of(kept) <= budget * cost_of(UNITS)
    assert mask.reached["macs"] == pytest.approx(2.0 * cost_of(kept))
    assert mask.reached["params"] == pytest.approx(100 + cost_of(kept))
    total = sum(site.score.sum() for site in ranking.sites)

    def score(counts) -> float:
        return sum(np.sort(s.score)[::-1][:n].sum() for s, n in zip(ranking.sites, counts, strict=True))

    allowed = [
        c for c in itertools.product(*(range(n + 1) for n in UNITS)) if cost_of(c) <= budget * cost_of(UNITS)
    ]
    best = max(map(score, allowed))
    assert score(kept) <= best + 1e-9
    assert best <= mask.objective["bound"] * total + 1e-9
    by_sums = [c for c in allowed if cost_of(c) + overcount(c) <= budget * cost_of(UNITS)]
    assert score(kept) >= max(map(score, by_sums)) - 1e-9


def overcount(kept) -> float:
    pairs = zip(itertools.pairwise(kept), itertools.pairwise(UNITS), strict=True)
    return TAPS * sum(a * (B - b) / 2 + b * (A - a) / 2 for (a, b), (A, B) in pairs)


def test_budgets_on_parameters_hold_for_products():
    ranking = chain(0)
    whole = cost_of(UNITS) + 100
    mask = select(ranking, Request(params=0.6))
    assert mask.reached["params"] <= 0.6 * whole
    assert mask.reached["params"] > 0.5 * whole


def test_a_site_that_nothing_goes_around_is_never_emptied():
    ranking = chain(1)
    ranking.sites[1].score *= 1e-9
    assert not select(ranking, 0.3).keep[ranking.sites[1].name]
    ranking.model["chained"] = [site.name for site in ranking.sites]
    assert all(select(ranking, budget).keep[s.name] for s in ranking.sites for budget in (0.3, 0.1))


@pytest.mark.parametrize("name", ["timm-vgg-bn", "timm-resnet"])
def test_what_is_promised_is_what_the_model_costs(name, tmp_path):
    model = open_model(str(saved_model(name)), device="cpu")
    data = DataSpec(str(tiny_image_folder(tmp_path / "images")))
    settings = ScoreSettings(method="magnitude", samples=8)
    ranking = scoring.score(make_plan(model, data, settings), tmp_path / "r.h5")
    mask = select(ranking, 0.5)
    kept = {name: len(units) for name, units in mask.keep.items()}
    slice_model(model.module, model.anatomy, mask.keep)
    after = dissect(model.module, model.family)
    assert ranking.model.get("chained", []) == (list(kept) if "vgg" in name else [])
    assert mask.reached["macs"] == pytest.approx(after.macs(ranking.tokens))
    assert mask.reached["macs"] == pytest.approx(model.anatomy.macs(ranking.tokens, kept))
    assert 0.4 < mask.reached["flops"] <= 0.5
