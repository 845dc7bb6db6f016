"""What the units of a site share costs something until the last one goes: against every mask there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from helpers.artefacts import tiny_ranking
from helpers.runs import examples
from hypothesis import given
from hypothesis import strategies as st

from optin_cli.artefacts.mask import Mask
from optin_cli.artefacts.ranking import Ranking, read_ranking, write_ranking
from optin_cli.errors import BudgetError
from optin_cli.reporting.costs import block_costs
from optin_cli.selection.select import select
from optin_cli.selection.settings import Request


def grouped(seed: int, base: int = 1500) -> Ranking:
    """Blocks whose heads share keys and values."""
    found = tiny_ranking(blocks=2, heads=3, neurons=4, seed=seed)
    for site in found.sites:
        if site.kind == "heads":
            site.base_macs_per_token, site.base_params = base, base + 1
    whole = [site.units for site in found.sites]
    found.dense["macs_per_token"] = sum(
        s.units * s.macs_per_token + s.base_macs_per_token for s in found.sites
    )
    found.dense["macs_per_pair"] = sum(s.units * s.macs_per_pair for s in found.sites)
    found.dense["site_params"] = sum(s.params(n) for s, n in zip(found.sites, whole, strict=True))
    found.dense["params"] = found.dense["site_params"] + 100
    return found


def macs(ranking: Ranking, units: list[int]) -> float:
    """By hand."""
    return sum(
        n * (s.macs_per_token * ranking.tokens + s.macs_per_pair * ranking.tokens**2)
        + (n > 0) * s.base_macs_per_token * ranking.tokens
        for s, n in zip(ranking.sites, units, strict=True)
    )


def params(ranking: Ranking, units: list[int]) -> float:
    return 100 + sum(
        n * s.params_per_unit + (n > 0) * s.base_params for s, n in zip(ranking.sites, units, strict=True)
    )


def kept(ranking: Ranking, mask: Mask) -> list[int]:
    return [len(mask.keep[site.name]) for site in ranking.sites]


def best(ranking: Ranking, macs_left: float, params_left: float = np.inf) -> float:
    """The largest score of all masks that fit; -inf where none does."""
    scores = [np.concatenate([[0], np.cumsum(np.sort(s.score)[::-1])]) for s in ranking.sites]
    found = -np.inf
    for units in itertools.product(*(range(s.units + 1) for s in ranking.sites)):
        if macs(ranking, list(units)) <= macs_left and params(ranking, list(units)) <= params_left:
            found = max(found, sum(score[n] for score, n in zip(scores, units, strict=True)))
    return float(found)


@examples(40)
@given(st.integers(0, 10_000), st.floats(0.02, 1.0), st.integers(1, 4000), st.sampled_from([None, 0.9, 0.8]))
def test_the_mask_is_the_best_of_all_and_its_costs_are_those_by_hand(seed, flops, base, share):
    ranking = grouped(seed, base)
    whole = ranking.dense_macs(ranking.tokens)
    assert whole == pytest.approx(macs(ranking, [s.units for s in ranking.sites]))
    most = np.inf if share is None else share * ranking.dense["params"]
    expected = best(ranking, flops * whole * (1 + 1e-12), most)
    try:
        mask = select(ranking, Request(flops=flops, params=share))
    except BudgetError:
        assert expected == -np.inf
        return
    units = kept(ranking, mask)
    score = sum(float(np.sort(s.score)[::-1][:n].sum()) for s, n in zip(ranking.sites, units, strict=True))
    assert mask.objective["optimal"]
    assert score == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert mask.reached["macs"] == pytest.approx(macs(ranking, units))
    assert mask.reached["flops"] == pytest.approx(macs(ranking, units) / whole)
    if share is not None:
        assert mask.reached["params"] == pytest.approx(params(ranking, units))
        assert mask.reached["params"] <= most
    blocks = block_costs(
        ranking, {s.name: n for s, n in zip(ranking.sites, units, strict=True)}, ranking.tokens
    )
    assert sum(one.macs for one in blocks) == pytest.approx(macs(ranking, units))


def test_uniform_layers_are_the_best_of_one_size():
    ranking = grouped(3)
    ranking.model["config"] = {site.name: {"entry": site.kind, "each": 1} for site in ranking.sites}
    room = 0.6 * ranking.dense_macs(ranking.tokens)
    mask = select(ranking, Request(flops=0.6, uniform=True))
    units = kept(ranking, mask)
    scores = [np.concatenate([[0], np.cumsum(np.sort(s.score)[::-1])]) for s in ranking.sites]
    sizes = {s.kind: s.units for s in ranking.sites}
    tried = {}
    for heads, neurons in itertools.product(range(1, sizes["heads"] + 1), range(1, sizes["neurons"] + 1)):
        counts = [heads if s.kind == "heads" else neurons for s in ranking.sites]
        if macs(ranking, counts) <= room:
            tried[tuple(counts)] = sum(score[n] for score, n in zip(scores, counts, strict=True))
    assert tuple(units) == max(tried, key=lambda counts: tried[counts])


def test_a_file_keeps_them_and_those_of_others_are_as_before(tmp_path):
    ranking = grouped(1)
    write_ranking(tmp_path / "r.h5", ranking)
    read = read_ranking(tmp_path / "r.h5")
    assert [(s.base_macs_per_token, s.base_params) for s in read.sites] == [
        (s.base_macs_per_token, s.base_params) for s in ranking.sites
    ]
    assert select(read, 0.5).keep == select(ranking, 0.5).keep
