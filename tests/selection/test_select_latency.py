"""Selection by a latency table."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from helpers.artefacts import latency_table
from helpers.runs import examples
from helpers.selection import WIDTH, kept, ranking, with_ranks
from hypothesis import given
from hypothesis import strategies as st

from optin_cli.artefacts.latency import LatencyTable
from optin_cli.errors import ArtefactError
from optin_cli.selection.problem import pose
from optin_cli.selection.select import select
from optin_cli.selection.settings import Request


def test_a_stair_is_climbed_in_whole_steps():
    """Sizes that cost as much as a larger one are never chosen: the stair is flat, so take all of it."""
    made = ranking()
    table = latency_table(made.sites, step=5)
    for share in np.linspace(0.35, 0.95, 7):
        mask = select(made, Request(latency=share, table=table))
        assert table.model_ms(kept(mask)) <= share * table.total_ms * (1 + 1e-9)
        assert {n % 5 for name, n in kept(mask).items() if "neurons" in name} == {0}


@pytest.mark.parametrize("slow", [0.0, 5.0])
def test_any_curve_gives_what_trying_all_sizes_gives(slow):
    """Neurons are slower at 15 than at 16, and with `slow` at none than at one: kernels are like that."""
    made = ranking(blocks=1, widths=(1,))
    table = latency_table(made.sites)
    heads, neurons = table.curves
    heads["ms"] = [0.0, 3.0, 6.0, 9.0, 12.0]
    neurons["counts"], neurons["ms"] = [0, 1, 10, 15, 16, 20], [slow, 1.0, 10.0, 40.0, 12.0, 20.0]
    table.total_ms, table.fixed_ms = 33.0, 1.0
    best = {site.name: np.append(0, np.cumsum(np.sort(site.score)[::-1])) for site in made.sites}
    total = sum(float(scores[-1]) for scores in best.values())
    for budget in np.arange(2.5, 33, 0.5):
        choices = [dict(zip(best, sizes, strict=True)) for sizes in product(range(5), range(21))]
        expected = max(
            sum(best[name][n] for name, n in choice.items())
            for choice in choices
            if table.model_ms(choice) <= budget
        )
        mask = select(made, Request(latency_ms=budget, table=table))
        assert mask.reached["latency_ms"] <= budget * (1 + 1e-9)
        assert mask.objective["kept"] == pytest.approx(expected / total)


def test_latency_of_the_current_model():
    made = ranking()
    table = latency_table(made.sites)
    for site in made.sites:
        site.units -= 1
        site.score, site.output, site.trajectory = site.score[1:], site.output[1:], site.trajectory[1:]
    now = table.model_ms({s.name: s.units for s in made.sites})
    assert now < table.total_ms
    mask = select(made, Request(latency=0.8, relative_to="current", table=table))
    assert 0.6 * now < table.model_ms(kept(mask)) <= 0.8 * now * (1 + 1e-9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device": "NVIDIA H100"}, "another device"),
        ({"dtype": "bfloat16"}, "another dtype"),
        ({"processor": "abacus"}, "another processor"),
    ],
)
def test_a_table_of_another_device_is_refused_unless_forced(change, words):
    made = ranking()
    table = latency_table(made.sites, **change)
    with pytest.raises(ArtefactError, match=words) as caught:
        select(made, Request(latency=0.5, table=table))
    assert "force=True" in caught.value.hint
    assert select(made, Request(latency=0.5, table=table, force=True)).keep


@pytest.mark.parametrize("other", [{"blocks": 2}, {"heads": 3}, {"neurons": 19}, {"blocks": 4}])
def test_a_table_of_another_shape_is_refused_even_then(other):
    table = latency_table(ranking(**other).sites)
    with pytest.raises(ArtefactError, match="another shape"):
        select(ranking(), Request(latency=0.5, table=table, force=True))


def test_a_table_of_a_pruned_model_knows_nothing_of_the_dense_one():
    made = ranking()
    table = latency_table(made.sites)
    table.model["dense_digest"] = "another"
    with pytest.raises(ArtefactError, match="relative_to='current'"):
        select(made, Request(latency=0.5, table=table))
    assert select(made, Request(latency=0.5, table=table, relative_to="current")).keep


def best_by_hand(made, table: LatencyTable, allowed: float, flops: float) -> float:
    """The largest kept score of all heads, ranks and neurons whose times and MACs fit."""
    request = Request(latency_ms=allowed, flops=flops, table=table, **WEIGHTS)
    problem, best = pose(made, request), 0.0
    options = []
    for site in problem.sites:
        ranks = range(4, WIDTH + 1, 4) if site.kind == "heads" else (site.width,)
        options.append([(n, rank) for n in range(site.units + 1) for rank in ranks])
    for choice in product(*options):
        pairs = list(zip(problem.sites, choice, strict=True))
        sizes = {site.name: n for site, (n, _) in pairs}
        ranks = {site.name: rank for site, (n, rank) in pairs if site.kind == "heads"}
        macs = sum(n * rank / site.width * site.macs_per_unit(10.0) for site, (n, rank) in pairs)
        if table.model_ms(sizes, ranks) <= allowed * (1 + 1e-12) and macs <= flops * made.dense_macs(10.0) * (
            1 + 1e-12
        ):
            order = {
                s.name: np.argsort(-scores) for s, scores in zip(problem.sites, problem.scores, strict=True)
            }
            keep = {name: sorted(order[name][:n].tolist()) for name, n in sizes.items()}
            best = max(
                best, problem.kept_score(keep, {n: r for n, r in ranks.items() if r < WIDTH and sizes[n]})
            )
    return best / sum(float(scores.sum()) for scores in problem.scores)


WEIGHTS: Any = {"output_weight": 0.3, "feature_weights": "sum"}
COSTS = {"in proportion": (0.5, 1.0), "hardly less": (0.95, 1.0), "more": (1.2, 1.0), "much less": (0.1, 1.0)}


@pytest.mark.parametrize("costs", COSTS)
@examples(8)
@given(st.integers(0, 1000), st.floats(0.3, 0.95))
def test_heads_and_ranks_are_the_best_by_their_times(costs, seed, share):
    """Kernels may like a lower rank less than MACs say: then there are whole heads."""
    made = with_ranks(ranking(blocks=2, heads=3, neurons=4, seed=seed), seed)
    table = latency_table(made.sites, ranks=COSTS[costs])
    request = Request(latency=share, table=table, **WEIGHTS)
    mask, best = select(made, request), best_by_hand(made, table, share * table.total_ms, 1.0)
    assert mask.objective["kept"] <= best + 1e-9
    assert mask.objective["bound"] >= best - 1e-9
    if mask.objective["optimal"]:
        assert mask.objective["kept"] == pytest.approx(best)
    taken = table.model_ms(kept(mask), mask.ranks)
    assert mask.reached["latency_ms"] == pytest.approx(taken)
    assert taken <= share * table.total_ms * (1 + 1e-9)
    if costs == "more":
        assert not mask.ranks


@examples(8)
@given(st.integers(0, 1000), st.floats(0.3, 0.9), st.floats(0.3, 0.9))
def test_a_budget_of_macs_holds_beside_times_of_ranks(seed, share, flops):
    made = with_ranks(ranking(blocks=2, heads=3, neurons=4, seed=seed), seed)
    table = latency_table(made.sites, ranks=(0.9, 1.0))
    mask = select(made, Request(latency=share, flops=flops, table=table, **WEIGHTS))
    assert mask.reached["latency_ms"] <= share * table.total_ms * (1 + 1e-9)
    assert mask.reached["flops"] <= flops * (1 + 1e-9)
    best = best_by_hand(made, table, share * table.total_ms, flops)
    assert mask.objective["kept"] <= best + 1e-9
    assert mask.objective["bound"] >= best - 1e-9
    if mask.objective["optimal"]:
        assert mask.objective["kept"] == pytest.approx(best)


def test_a_table_of_whole_heads_leaves_them_whole(caplog):
    made = with_ranks(ranking())
    table = latency_table(made.sites)
    assert not select(made, Request(latency=0.5, table=table)).ranks
    assert not caplog.messages
    assert not select(made, Request(latency=0.5, table=table, ranks=True)).ranks
    assert (
        "the latency table (`optin bench MODEL --table` times ranks, too) knows whole heads alone"
        in caplog.text
    )
    told = latency_table(made.sites, ranks=(0.5, 1.0))
    assert select(made, Request(latency=0.5, table=told)).ranks
    assert not select(made, Request(latency=0.5, table=told, ranks=False)).ranks


def test_a_model_whose_heads_were_cut_is_timed_at_their_rank():
    made = ranking()
    for site in made.sites:
        site.width = 4 if site.kind == "heads" else site.width
    table = latency_table(made.sites, ranks=(0.5, 1.0))
    whole = {site.name: site.units for site in made.sites}
    ranks = {site.name: 4 for site in made.sites if site.kind == "heads"}
    now = table.model_ms(whole, ranks)
    assert now < table.total_ms
    mask = select(made, Request(latency=1.0, relative_to="current", table=table))
    assert mask.reached["latency_ms"] == pytest.approx(now)
