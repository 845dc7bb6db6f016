"""`select --uniform`: one size for all layers of a kind, the best there is; brute force tries every pair of sizes."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from helpers.artefacts import latency_table
from helpers.interactions import sketch_of
from helpers.runs import examples
from helpers.selection import WIDTH, kept, macs_of, params_of, ranking, with_ranks
from hypothesis import given
from hypothesis import strategies as st

from optin_cli.artefacts.ranking import Ranking
from optin_cli.errors import BudgetError, UsageError
from optin_cli.selection.problem import pose
from optin_cli.selection.ranks import STEP, rank_losses
from optin_cli.selection.select import select
from optin_cli.selection.settings import Request

ENTRIES = {"heads": "num_attention_heads", "neurons": "intermediate_size"}


def sized(made: Ranking, **each: int) -> Ranking:
    """A ranking of a class that can size both kinds of units; `each` says otherwise of a site."""
    config = {
        site.name: {
            "entry": ENTRIES[site.kind],
            "each": each.get(f"b{site.block}", 1) if site.kind == "neurons" else 1,
        }
        for site in made.sites
    }
    return dataclasses.replace(made, model={**made.model, "config": config})


def best_score(made: Ranking, heads: int, neurons: int) -> float:
    """Of so many units of every layer."""
    counts = {"heads": heads, "neurons": neurons}
    return sum(float(np.sort(site.score)[::-1][: counts[site.kind]].sum()) for site in made.sites)


@examples(60)
@given(
    st.floats(0.15, 1), st.floats(0.15, 1), st.integers(0, 50), st.sampled_from([(1, 1, 1), (1, 2, 5)]),
    st.booleans(), st.integers(0, 2),
)  # fmt: skip
def test_no_pair_of_sizes_within_the_budgets_keeps_more(flops, params, seed, widths, timed, min_heads):
    made = sized(ranking(seed=seed, widths=widths))
    table = latency_table(made.sites)
    request = Request(flops=flops, params=params, min_heads=min_heads, uniform=True)
    if timed:
        request = dataclasses.replace(request, table=table, latency=0.8)
    scores, whole = {}, select(made, 1.0)
    for pair in itertools.product(range(max(1, min_heads), 5), range(1, 21)):
        counts = dict(zip(("heads", "neurons"), pair, strict=True))
        one = {site.name: list(range(counts[site.kind])) for site in made.sites}
        mask = dataclasses.replace(whole, keep=one)
        fits = macs_of(made, mask) <= flops * made.dense_macs(10.0) * (1 + 1e-12)
        fits &= params_of(made, mask) <= params * made.dense["params"] * (1 + 1e-12)
        if timed:
            fits &= table.model_ms(kept(mask)) <= 0.8 * table.total_ms * (1 + 1e-12)
        if fits:
            scores[pair] = best_score(made, *pair)
    if not scores:
        with pytest.raises(BudgetError):
            select(made, request)
        return
    mask = select(made, request)
    found = {kind: {len(mask.keep[s.name]) for s in made.sites if s.kind == kind} for kind in ENTRIES}
    (heads,), (neurons,) = found["heads"], found["neurons"]
    total = sum(float(site.score.sum()) for site in made.sites)
    assert (heads, neurons) in scores
    assert mask.objective["kept"] * total == pytest.approx(max(scores.values()))
    assert mask.objective["optimal"]
    assert mask.objective["kept"] <= mask.objective["bound"] + 1e-12


def test_the_best_units_of_each_layer_stay():
    made = sized(ranking())
    mask = select(made, Request(flops=0.5, uniform=True))
    for site in made.sites:
        stay = mask.keep[site.name]
        assert min(site.score[stay]) >= max(
            (site.score[u] for u in range(site.units) if u not in stay), default=0
        )


def test_a_mask_says_what_being_uniform_costs():
    made = sized(ranking())
    mask, free = select(made, Request(flops=0.5, uniform=True)), select(made, 0.5)
    assert mask.objective["free"] == {
        "kept": free.objective["kept"], "flops": free.reached["flops"], "whole": []
    }  # fmt: skip
    assert mask.objective["kept"] <= free.objective["kept"]
    assert mask.budget["uniform"] and "uniform" not in free.budget


def test_units_that_the_class_cannot_size_stay():
    made = ranking()
    config = {
        site.name: {"entry": "intermediate_size", "each": 1} for site in made.sites if site.kind == "neurons"
    }
    mask = select(
        dataclasses.replace(made, model={**made.model, "config": config}), Request(flops=0.9, uniform=True)
    )
    assert all(len(mask.keep[site.name]) == site.units for site in made.sites if site.kind == "heads")
    assert len({len(mask.keep[site.name]) for site in made.sites if site.kind == "neurons"}) == 1
    assert mask.objective["free"]["whole"] == ["heads"]


def test_a_ratio_gives_wider_layers_as_much_more():
    made = ranking()
    sites = [
        dataclasses.replace(site, units=10) if site.kind == "neurons" and site.block == 0 else site
        for site in made.sites
    ]
    for site in sites:
        for name in ("score", "trajectory", "output"):
            setattr(site, name, getattr(site, name)[: site.units])
    mask = select(sized(dataclasses.replace(made, sites=sites), b1=2, b2=2), Request(flops=0.4, uniform=True))
    counts = [len(mask.keep[f"blocks.{block}.neurons"]) for block in range(3)]
    assert 0 < counts[0] < 10 and counts == [counts[0], 2 * counts[0], 2 * counts[0]]


def test_guards_hold_for_all_layers():
    made = sized(ranking())
    mask = select(made, Request(flops=0.8, uniform=True, protect=("blocks.1.heads",)))
    assert all(len(mask.keep[f"blocks.{block}.heads"]) == 4 for block in range(3))
    rounded = select(made, Request(flops=0.5, uniform=True, round_to=8))
    assert len(rounded.keep["blocks.0.neurons"]) in (8, 16, 20)


def test_an_older_ranking_is_read_by_the_familys_table():
    bert = dataclasses.replace(ranking(), model={**ranking().model, "family": "bert"})
    mask = select(bert, Request(flops=0.9, uniform=True))
    assert mask.objective["free"]["whole"] == ["heads"]
    for family in ("t5", "swin", "made-up"):  # two streams, a ratio, unknown
        other = dataclasses.replace(bert, model={**bert.model, "family": family})
        with pytest.raises(UsageError, match="older version"):
            select(other, Request(flops=0.8, uniform=True))


def test_interactions_exchange_units_within_layers():
    made = ranking()
    sketch = sketch_of(made)
    mask = select(sized(made), Request(flops=0.5, uniform=True, interactions="layer"), sketch)
    for kind in ENTRIES:
        assert len({len(mask.keep[site.name]) for site in made.sites if site.kind == kind}) == 1
    assert mask.objective["interactions"] is not None


def with_widths(made: Ranking) -> Ranking:
    """A class whose config says the width of a head, too."""
    config = {
        name: {**by, "width": "head_dim"} if name.endswith("heads") else by
        for name, by in sized(made).model["config"].items()
    }
    return dataclasses.replace(made, model={**made.model, "config": config})


@examples(40)
@given(st.floats(0.1, 1), st.integers(0, 50), st.integers(1, 8))
def test_all_layers_have_the_best_number_of_heads_and_rank(flops, seed, least):
    made = with_widths(with_ranks(ranking(seed=seed), seed))
    request = Request(flops=flops, uniform=True, output_weight=0.3, feature_weights="sum", min_neurons=least)
    problem = pose(made, request)
    lost = rank_losses(made, 0.3, "sum")
    scores = dict(zip((site.name for site in problem.sites), problem.scores, strict=True))
    found = {}
    for heads, rank, neurons in itertools.product(
        range(1, 5), range(STEP, WIDTH + 1, STEP), range(least, 21)
    ):
        macs, kept_score = 0.0, 0.0
        for site in made.sites:
            best = np.concatenate([[0.0], np.cumsum(np.sort(scores[site.name])[::-1])])
            if site.kind == "heads":
                macs += heads * rank / WIDTH * site.macs_per_unit(10.0)
                kept_score += best[heads] * max(0.0, 1 - lost[site.name][rank] / best[-1])
            else:
                macs += neurons * site.macs_per_unit(10.0)
                kept_score += best[neurons]
        if macs <= flops * made.dense_macs(10.0) * (1 + 1e-12):
            found[heads, rank, neurons] = kept_score
    if not found:
        with pytest.raises(BudgetError):
            select(made, request)
        return
    mask = select(made, request)
    total = sum(float(one.sum()) for one in scores.values())
    assert mask.objective["kept"] * total == pytest.approx(max(found.values()))
    heads = {len(mask.keep[site.name]) for site in made.sites if site.kind == "heads"}
    ranks = {mask.ranks.get(site.name, WIDTH) for site in made.sites if site.kind == "heads"}
    assert len(heads) == len(ranks) == 1
    assert mask.reached["flops"] <= flops * (1 + 1e-9)


def test_heads_stay_whole_where_the_config_says_no_width(caplog):
    made = with_ranks(ranking(blocks=2, heads=2))
    assert not select(sized(made), Request(flops=0.4, uniform=True)).ranks
    assert select(with_widths(made), Request(flops=0.4, uniform=True)).ranks
    assert not select(with_widths(made), Request(flops=0.4, uniform=True, ranks=False)).ranks
    with pytest.raises(UsageError, match="does not say the width of a head"):
        select(sized(made), Request(flops=0.4, uniform=True, ranks=True))


def test_heads_that_cannot_be_cut_keep_those_of_their_width_whole():
    """Cross-attention of another kind has the same entry of the config."""
    made = with_ranks(ranking(blocks=2, heads=2))
    part = dataclasses.replace(made, rank_sites=made.rank_sites[:1])
    assert not select(with_widths(part), Request(flops=0.4, uniform=True)).ranks


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (Request(flops=0.5, uniform=True, merge="joint"), "merges tokens"),
        (Request(flops=0.5, uniform=True, interactions="global"), "moves units between layers"),
    ],
)
def test_what_can_not_be_uniform_is_refused(request_, says):
    with pytest.raises(UsageError, match=says):
        select(sized(ranking()), request_)


def test_models_that_no_stock_class_opens_are_refused():
    made = ranking()
    for model, says in (
        ({"config": {}}, "says no sizes of what is pruned"),
        ({"config": sized(made).model["config"], "merges": [2, 0, 0]}, "merges tokens"),
    ):
        with pytest.raises(UsageError, match=says):
            select(dataclasses.replace(made, model={**made.model, **model}), Request(flops=0.5, uniform=True))


def test_layers_of_different_sizes_meet_at_one_that_all_have():
    made = ranking()
    sites = [
        dataclasses.replace(site, units=3) if site.name == "blocks.2.heads" else site for site in made.sites
    ]
    for name in ("score", "trajectory", "output"):
        setattr(sites[4], name, getattr(sites[4], name)[:3])
    mask = select(sized(dataclasses.replace(made, sites=sites)), Request(flops=1.0, uniform=True))
    assert [len(mask.keep[f"blocks.{block}.heads"]) for block in range(3)] == [3, 3, 3]
    with pytest.raises(UsageError, match="can't have the same size"):
        select(
            sized(dataclasses.replace(made, sites=sites)),
            Request(flops=1.0, uniform=True, protect=("blocks.0.heads",)),
        )
