"""Masks of rankings that say what whole sublayers cost: the best of every mask there is."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from helpers.artefacts import tiny_ranking
from helpers.runs import examples
from hypothesis import given
from hypothesis import strategies as st

from optin_cli.artefacts.site_losses import SiteLosses
from optin_cli.errors import BudgetError
from optin_cli.importance import combine, losses, with_whole
from optin_cli.selection.select import select
from optin_cli.selection.settings import Request


def whole_ranking(seed: int, scale: float):
    """Some sublayers cost more than their heads one by one, some less."""
    found = tiny_ranking(blocks=3, heads=3, neurons=3, seed=seed)
    rng = np.random.default_rng(seed)
    sublayers = [
        SiteLosses(site.name, site.columns, scale * rng.random((1, len(site.columns))), scale * rng.random(1))
        for site in found.sites
        if site.kind == "heads"
    ]
    return replace(found, sublayers=sublayers)


def lost(site_scores: np.ndarray, whole: float | None, kept: int) -> float:
    """The score that goes with all but the best `kept` units, as the definition says."""
    total, gone = (float(np.sort(site_scores)[:n].sum()) for n in (len(site_scores), len(site_scores) - kept))
    return gone + max(0.0, (whole or 0.0) - total) * (gone / total) ** 3


@examples(40)
@given(st.integers(0, 10_000), st.floats(0.05, 1.0), st.sampled_from([0.0, 1.0, 30.0]))
def test_the_mask_loses_least_of_all_with_whole_sublayers_counted(seed, flops, scale):
    ranking = whole_ranking(seed, scale)
    request = Request(flops=flops, feature_weights="sum", output_weight=0.5, round_to=1)
    scores = combine(ranking.sites, 0.5, "sum")
    whole = {name: float(one[0]) for name, one in losses(ranking, ranking.sublayers, 0.5, "sum").items()}
    sites = ranking.sites

    def loss(counts) -> float:
        return sum(lost(scores[s.name], whole.get(s.name), n) for s, n in zip(sites, counts, strict=True))

    room = flops * ranking.dense_macs(ranking.tokens) * (1 + 1e-12)
    fitting = [
        counts
        for counts in itertools.product(*(range(s.units + 1) for s in sites))
        if sum(s.macs(ranking.tokens, n) for s, n in zip(sites, counts, strict=True)) <= room
    ]
    try:
        mask = select(ranking, request)
    except BudgetError:
        assert not fitting
        return
    assert loss([len(mask.keep[s.name]) for s in sites]) == pytest.approx(min(map(loss, fitting)))
    for site in sites:  # which ones stay is what it was
        best = np.argsort(-scores[site.name], kind="stable")[: len(mask.keep[site.name])]
        assert mask.keep[site.name] == sorted(best.tolist())


def test_a_sublayer_that_single_heads_say_nothing_of_keeps_a_head():
    """As behind a norm, where each head's derivative is small as long as the others are there."""
    plain = tiny_ranking(blocks=3, heads=3, neurons=3, seed=0)
    for site in plain.sites:
        small = 1e-6 if site.name == "blocks.1.heads" else 1.0
        site.trajectory, site.output = site.trajectory * small, site.output * small
    whole = SiteLosses("blocks.1.heads", plain.sites[0].columns[:1], np.full((1, 1), 50.0), np.zeros(1))
    request = Request(flops=0.6, feature_weights="sum", output_weight=0.5)
    assert not select(plain, request).keep["blocks.1.heads"]
    assert select(replace(plain, sublayers=[whole]), request).keep["blocks.1.heads"]


def test_a_whole_that_costs_less_than_its_units_changes_nothing():
    scores = np.array([3.0, 1.0, 2.0])
    assert with_whole(scores, 5.0).tolist() == scores.tolist()
    assert with_whole(np.zeros(3), 5.0).sum() == pytest.approx(5.0)


@examples(40)
@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=8).map(np.array), st.floats(1.0, 1e4).map(float))
def test_scores_add_up_to_the_whole_and_keep_their_order(scores, times):
    loss = times * float(scores.sum())
    found = with_whole(scores, loss)
    assert found.sum() == pytest.approx(loss)
    assert (found >= scores).all()
    order = np.argsort(scores, kind="stable")
    assert (np.diff(found[order]) >= -1e-9 * loss).all()
