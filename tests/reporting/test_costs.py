"""Costs by block add up to what a mask says that it reaches."""

from __future__ import annotations

from functools import partial

import pytest
from helpers.artefacts import chain_ranking, latency_table, tiny_ranking

from optin_cli.reporting.costs import block_costs
from optin_cli.selection.select import select
from optin_cli.selection.settings import Request


def sizes(mask):
    return {name: len(kept) for name, kept in mask.keep.items()}


@pytest.mark.parametrize("share", [1.0, 0.7, 0.4])
@pytest.mark.parametrize("make", [tiny_ranking, partial(chain_ranking, 3)], ids=["bert", "chain"])
def test_blocks_add_up_to_what_the_mask_reaches(make, share):
    ranking = make()
    mask = select(ranking, Request(flops=share))
    costs = block_costs(ranking, sizes(mask), mask.budget["tokens"])
    assert sum(cost.macs for cost in costs) == pytest.approx(mask.reached["macs"])
    fixed = ranking.dense["params"] - ranking.dense["site_params"]
    assert fixed + sum(cost.params for cost in costs) == pytest.approx(mask.reached["params"])


def test_heads_of_a_lower_rank_cost_their_dimensions():
    ranking = tiny_ranking()
    mask = select(ranking, Request(flops=0.7))
    name = next(site.name for site in ranking.sites if site.kind == "heads" and mask.keep[site.name])
    width = next(site.width for site in ranking.sites if site.name == name)
    whole, cut = (block_costs(ranking, sizes(mask), 10.0, ranks=ranks) for ranks in ({}, {name: width // 2}))
    site = next(site for site in ranking.sites if site.name == name)
    less = len(mask.keep[name]) * site.macs_per_unit(10.0) * (1 - (width // 2) / width)
    assert sum(cost.macs for cost in whole) - sum(cost.macs for cost in cut) == pytest.approx(less)


def test_latency_by_block_adds_up_to_what_the_table_predicts():
    ranking = tiny_ranking()
    table = latency_table(ranking.sites)
    mask = select(ranking, Request(flops=0.5, table=table, force=True))
    costs = block_costs(ranking, sizes(mask), mask.budget["tokens"], table=table)
    assert table.fixed_ms + sum(cost.ms for cost in costs) == pytest.approx(mask.reached["latency_ms"])
    assert all(cost.ms is None for cost in block_costs(ranking, sizes(mask), 10.0))


def test_merged_tokens_cost_the_blocks_behind_nothing():
    ranking = tiny_ranking()
    whole = {site.name: site.units for site in ranking.sites}
    plain, merged = (block_costs(ranking, whole, 11.5, merges) for merges in ([], [4, 0, 0]))
    assert merged[0].macs == plain[0].macs
    seen = 11.5 - 4
    second = sum(site.units * site.macs_per_unit(seen) for site in ranking.sites if site.block == 1)
    assert merged[1].macs == pytest.approx(second)
