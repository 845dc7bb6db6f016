"""From a ranking to a mask: budgets of every kind, guards, rounding, recombination, bad input."""

from __future__ import annotations

import dataclasses
import re
from itertools import product

import numpy as np
import pytest
from helpers.artefacts import latency_table
from helpers.runs import examples
from hypothesis import given
from hypothesis import strategies as st

from optin_cli.artefacts.mask import mask_to_json
from optin_cli.artefacts.ranking import RankedSite, Ranking, combine
from optin_cli.errors import ArtefactError, BudgetError, UsageError
from optin_cli.selection.problem import MIB
from optin_cli.selection.request import Request, round_size
from optin_cli.selection.select import emptied_sites, select

FIXED_PARAMS = 5000


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
                f"blocks.{block}.{kind}", kind, block, units, 8, cost, pair, cost + 1, trajectory.sum(1),
                trajectory, output, [1, 2], np.zeros((0, units, 2), np.float32),
            )  # fmt: skip
            sites.append(site)
    site_params = sum(s.units * s.params_per_unit for s in sites) / pruned
    return Ranking(
        model={"digest": "d" * 64, "family": "made-up", "id": "m", "task": "t", "class": "c"},
        data={"fingerprint": "f", "spec": "s", "split": "train"},
        row_ids=[0, 1],
        method="ablation",
        settings={},
        tokens=10.0,
        dense={
            "params": FIXED_PARAMS + site_params,
            "site_params": site_params,
            "macs_per_token": sum(s.units * s.macs_per_token for s in sites) / pruned,
            "macs_per_pair": sum(s.units * s.macs_per_pair for s in sites) / pruned,
        },
        sites=sites,
    )


def macs_of(made: Ranking, mask, tokens: float = 10.0) -> float:
    return sum(len(mask.keep[s.name]) * s.macs_per_unit(tokens) for s in made.sites)


def params_of(made: Ranking, mask) -> float:
    return FIXED_PARAMS + sum(len(mask.keep[s.name]) * s.params_per_unit for s in made.sites)


def kept(mask) -> dict[str, int]:
    return {name: len(units) for name, units in mask.keep.items()}


# budgets


@examples(60)
@given(st.floats(0.01, 1.0), st.integers(0, 50), st.sampled_from([(1, 1, 1), (1, 2, 5)]))
def test_the_macs_budget_is_never_exceeded(flops, seed, widths):
    made = ranking(seed=seed, widths=widths)
    mask = select(made, flops)
    assert macs_of(made, mask) <= flops * made.dense_macs(10.0) * (1 + 1e-9)
    assert mask.reached["flops"] == pytest.approx(macs_of(made, mask) / made.dense_macs(10.0))
    assert 0 <= mask.objective["kept"] <= mask.objective["bound"] <= 1 + 1e-9
    assert mask.objective["gap"] == pytest.approx(mask.objective["bound"] - mask.objective["kept"], abs=1e-12)
    assert mask.objective["optimal"]


@examples(80)
@given(
    st.floats(0.1, 1), st.floats(0.4, 1), st.floats(0.1, 1), st.integers(0, 20), st.sampled_from([1, 8]),
    st.sampled_from([(1, 1, 1), (1, 2, 5)]),
)  # fmt: skip
def test_all_budgets_hold_together(flops, params, memory, seed, size, widths):
    made = ranking(seed=seed, widths=widths)
    table = latency_table(made.sites)
    mib = (FIXED_PARAMS + memory * made.dense["site_params"]) * 4 / MIB
    request = Request(flops=flops, params=params, memory=mib, latency=0.9, table=table, round_to=size)
    try:
        mask = select(made, request)
    except BudgetError:
        assert params * made.dense["params"] < FIXED_PARAMS
        return
    assert macs_of(made, mask) <= flops * made.dense_macs(10) * (1 + 1e-9)
    assert params_of(made, mask) <= params * made.dense["params"] * (1 + 1e-9)
    assert params_of(made, mask) * 4 / MIB <= mib * (1 + 1e-9)
    assert table.model_ms(kept(mask)) <= 0.9 * table.total_ms * (1 + 1e-9)
    reached = mask.reached
    assert reached["params"] == params_of(made, mask)
    assert reached["memory"] == pytest.approx(params_of(made, mask) * 4 / MIB)
    assert reached["latency_ms"] == pytest.approx(table.model_ms(kept(mask)))
    assert (reached["dense_params"], reached["table_latency_ms"]) == (made.dense["params"], table.total_ms)


@examples(40)
@given(st.floats(0.05, 1), st.floats(0, 1), st.sampled_from([1, 8]), st.sampled_from(["flops", "latency"]))
def test_a_larger_budget_never_keeps_less(large, share, size, what):
    made = ranking(widths=(1, 2, 5))
    table = latency_table(made.sites)
    small = large * share + 0.05 * (1 - share)
    scores = [
        select(made, Request(**{what: budget}, table=table, round_to=size, force=True)).objective["kept"]
        for budget in (min(small, large) + 0.1, large + 0.1)
        if budget <= 1
    ]
    assert scores == sorted(scores)


def test_half_precision_weights_take_half_the_memory():
    made = ranking()
    whole = select(made, Request(memory=0.03))
    made.dense["dtype"] = "bfloat16"
    assert kept(select(made, Request(memory=0.015))) == kept(whole)
    assert select(made, Request(memory=0.015)).reached["memory"] <= 0.015


def test_the_memory_of_what_is_not_pruned_counts():
    with pytest.raises(BudgetError, match=r"--memory 0.01 can't be met") as caught:
        select(ranking(), Request(memory=0.01))
    smallest = float(re.search(r"--memory ([\d.]+)", caught.value.hint)[1])
    assert smallest == pytest.approx(FIXED_PARAMS * 4 / MIB, abs=1e-4)
    assert sum(kept(select(ranking(), Request(memory=smallest))).values()) == 0


def test_budgets_of_a_pruned_model_count_from_the_dense_one():
    made = ranking(pruned=0.8)
    dense, current = select(made, 0.5), select(made, Request(flops=0.5, relative_to="current"))
    assert macs_of(made, dense) <= 0.5 * made.dense_macs(10)
    assert macs_of(made, current) <= 0.5 * made.macs(10) < macs_of(made, dense)
    assert dense.reached["flops"] == pytest.approx(macs_of(made, dense) / made.dense_macs(10))
    assert current.reached["flops"] == pytest.approx(macs_of(made, current) / made.macs(10))
    smaller = select(made, Request(params=0.7, relative_to="current"))
    sites = sum(s.units * s.params_per_unit for s in made.sites)
    assert params_of(made, smaller) <= 0.7 * (FIXED_PARAMS + sites)
    assert params_of(made, select(made, Request(params=0.7))) > 0.7 * (FIXED_PARAMS + sites)


@pytest.mark.parametrize("tokens", [1, 10, 2000])
def test_the_budget_holds_at_the_asked_length(tokens):
    made = ranking()
    mask = select(made, Request(flops=0.5, tokens=tokens))
    assert macs_of(made, mask, tokens) <= 0.5 * made.dense_macs(tokens)
    assert mask.reached["macs"] == pytest.approx(macs_of(made, mask, tokens))


@pytest.mark.parametrize(
    "request_",
    [
        Request(flops=0.1, params=0.5, memory=0.02, min_heads=4, min_neurons=18),
        Request(flops=0.01, min_neurons=1),
        Request(params=0.3),
        Request(latency=0.07, table=latency_table(ranking().sites)),
        Request(latency_ms=1.5, table=latency_table(ranking().sites), protect=("blocks.1.*",)),
    ],
)
def test_budgets_out_of_reach_name_the_smallest_that_can_be_asked_for(request_):
    with pytest.raises(BudgetError) as caught:
        select(ranking(), request_)
    assert caught.value.exit_code == 4
    told = re.findall(r"--(\w+) ([\d.]+)(ms)?", caught.value.hint.split(";")[0])
    changes = {name + ("_ms" if unit else ""): float(number) for name, number, unit in told}
    assert changes
    mask = select(ranking(), dataclasses.replace(request_, **changes))
    below = {name: number * 0.99 for name, number in changes.items()}
    with pytest.raises(BudgetError):
        select(ranking(), dataclasses.replace(request_, **below))
    assert ("relax" in caught.value.hint) == any(
        len(mask.keep[s.name]) for s in ranking().sites
    )  # no guard, no advice to relax one


# what is kept


def test_the_best_units_of_a_site_are_kept():
    made = ranking()
    mask = select(made, 0.5)
    for site in made.sites:
        count = len(mask.keep[site.name])
        assert set(mask.keep[site.name]) == set(np.argsort(-site.score, kind="stable")[:count].tolist())


def test_everything_is_kept_at_one():
    assert list(kept(select(ranking(), 1.0)).values()) == [4, 20] * 3


def test_small_budgets_empty_layers_and_say_so():
    mask = select(ranking(), 0.02)
    assert emptied_sites(mask)
    assert all(not mask.keep[name] for name in emptied_sites(mask))


def test_lambda_recombines_the_parts():
    made = ranking()
    output_only = select(made, Request(flops=0.5, output_weight=1e9))
    for site in made.sites:
        best = set(np.argsort(-site.output, kind="stable")[: len(output_only.keep[site.name])].tolist())
        assert set(output_only.keep[site.name]) == best
    for site in made.sites:
        site.score = combine(made.sites, 0.7)[site.name]
    assert select(made, 0.5).keep == select(made, Request(flops=0.5, output_weight=0.7)).keep


def test_the_same_ranking_gives_the_same_bytes():
    assert mask_to_json(select(ranking(), 0.4)) == mask_to_json(select(ranking(), 0.4))


def test_the_mask_records_what_was_asked():
    table = latency_table(ranking().sites)
    request = Request(
        flops=0.7, latency_ms=table.total_ms, table=table, min_heads=1, max_prune=0.8, round_to="auto"
    )
    asked = select(ranking(), request).budget
    assert (asked["flops"], asked["latency_ms"], asked["latency"], asked["memory"]) == (
        0.7,
        table.total_ms,
        None,
        None,
    )
    assert (asked["min_heads"], asked["max_prune"], asked["round_to"]) == (1, 0.8, 1)
    assert asked["latency_table"]["digest"] == table.digest
    assert asked["latency_table"]["batch_size"] == table.setting["batch_size"]


# guards


@examples(30)
@given(st.integers(0, 4), st.integers(0, 20), st.floats(0.1, 1.0))
def test_minima_hold_or_the_budget_is_refused(heads, neurons, flops):
    made = ranking()
    least = sum(
        min(heads if s.kind == "heads" else neurons, s.units) * s.macs_per_unit(10) for s in made.sites
    )
    try:
        mask = select(made, Request(flops=flops, min_heads=heads, min_neurons=neurons))
    except BudgetError:
        assert least > flops * made.dense_macs(10)
        return
    for site in made.sites:
        assert len(mask.keep[site.name]) >= (heads if site.kind == "heads" else neurons)


@pytest.mark.parametrize(
    ("share", "least"), [(0.9, {4: 1, 20: 2}), (0.5, {4: 2, 20: 10}), (0, {4: 4, 20: 20}), (1, {4: 0, 20: 0})]
)
def test_no_layer_loses_more_than_its_share(share, least):
    made = ranking()
    reachable = sum(least[s.units] * s.macs_per_unit(10) for s in made.sites) / made.dense_macs(10)
    for flops in (reachable + 1e-9, 0.9):
        mask = (
            select(made, Request(flops=min(max(flops, 1e-6), 1), max_prune=share))
            if flops >= reachable
            else None
        )
        if mask is not None:
            assert all(len(mask.keep[s.name]) >= least[s.units] for s in made.sites)


def test_protected_sites_stay_whole():
    mask = select(ranking(), Request(flops=0.7, protect=("blocks.0.*", "*.2.heads")))
    assert len(mask.keep["blocks.0.heads"]) == 4
    assert len(mask.keep["blocks.0.neurons"]) == 20
    assert len(mask.keep["blocks.2.heads"]) == 4


@pytest.mark.parametrize(("only", "whole"), [("heads", "neurons"), ("neurons", "heads")])
def test_only_one_kind_is_pruned(only, whole):
    made = ranking()
    mask = select(made, Request(flops=0.8, only=only))
    assert all(len(mask.keep[s.name]) == s.units for s in made.sites if s.kind == whole)
    assert sum(len(mask.keep[s.name]) for s in made.sites if s.kind == only) > 0
    assert macs_of(made, mask) > 0.7 * made.dense_macs(10)


# rounding


@examples(40)
@given(st.sampled_from([2, 8, 16, 64]), st.floats(0.05, 1), st.sampled_from([16, 20, 21]), st.integers(0, 9))
def test_neurons_come_in_multiples_or_whole_layers_within_the_budget(size, flops, neurons, least):
    made = ranking(neurons=neurons)
    try:
        mask = select(made, Request(flops=flops, round_to=size, min_neurons=least))
    except BudgetError:
        assert least
        return
    assert macs_of(made, mask) <= flops * made.dense_macs(10) * (1 + 1e-9)
    for site in made.sites:
        count = len(mask.keep[site.name])
        if site.kind == "neurons":
            assert count % size == 0 or count == neurons
            assert count >= least
    assert {len(mask.keep[s.name]) for s in made.sites if s.kind == "heads"} <= set(range(5))


def test_a_whole_layer_is_always_a_choice():
    assert set(kept(select(ranking(neurons=21), Request(flops=1.0, round_to=8))).values()) == {4, 21}


def test_heads_are_not_rounded():
    made = ranking()
    assert any(
        n % 2 for name, n in kept(select(made, Request(flops=0.6, round_to=16))).items() if "heads" in name
    )


def test_rounding_costs_score_but_no_more_than_it_must():
    """Against all rounded masks: 3 sites of 21 neurons in eights, heads whole."""
    made = ranking(neurons=21)
    mask = select(made, Request(flops=0.85, round_to=8, only="neurons"))
    neurons = [s for s in made.sites if s.kind == "neurons"]
    room = 0.85 * made.dense_macs(10) - sum(
        s.units * s.macs_per_unit(10) for s in made.sites if s.kind == "heads"
    )
    best = max(
        sum(np.sort(s.score)[::-1][:n].sum() for s, n in zip(neurons, sizes, strict=True))
        for sizes in product((0, 8, 16, 21), repeat=3)
        if sum(n * s.macs_per_unit(10) for s, n in zip(neurons, sizes, strict=True)) <= room
    )
    assert sum(s.score[mask.keep[s.name]].sum() for s in neurons) == pytest.approx(best)


@pytest.mark.parametrize(
    ("device", "dtype", "size"),
    [("cpu", "float32", 1), ("NVIDIA H100", "bfloat16", 8), ("NVIDIA H100", "float32", 16)],
)
def test_auto_rounds_for_the_device(device, dtype, size):
    made = ranking()
    made.device, made.dtype = device, dtype
    assert round_size(Request(flops=0.5, round_to="auto"), made) == size
    table = latency_table(made.sites, device=device, dtype=dtype)
    made.device = "cpu"
    assert round_size(Request(flops=0.5, round_to="auto", table=table), made) == size


# latency


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
    assert "--force" in caught.value.hint
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
    with pytest.raises(ArtefactError, match="relative-to current"):
        select(made, Request(latency=0.5, table=table))
    assert select(made, Request(latency=0.5, table=table, relative_to="current")).keep


# bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"flops": 0}, "--flops"),
        ({"flops": -0.5}, "--flops"),
        ({"flops": 1.01}, "--flops"),
        ({"flops": float("nan")}, "--flops"),
        ({"params": 2}, "--params"),
        ({"latency": 0}, "--latency"),
        ({"memory": 0}, "--memory"),
        ({"memory": float("inf")}, "--memory"),
        ({"latency_ms": float("nan")}, "--latency"),
        ({}, "no budget"),
        ({"latency": 0.5}, "--latency-table"),
        ({"latency_ms": 5}, "--latency-table"),
        ({"flops": 0.5, "relative_to": "moon"}, "relative-to"),
        ({"flops": 0.5, "tokens": 0}, "tokens"),
        ({"flops": 0.5, "output_weight": -1}, "lambda"),
        ({"flops": 0.5, "protect": ("nothing.*",)}, "matches no site"),
        ({"flops": 0.5, "min_heads": -1}, "negative"),
        ({"flops": 0.5, "max_prune": 1.5}, "max-prune-per-layer"),
        ({"flops": 0.5, "only": "wheels"}, "it has heads, neurons"),
        ({"flops": 0.5, "round_to": 0}, "round-to"),
        ({"flops": 0.5, "round_to": "many"}, "round-to"),
    ],
)
def test_wrong_requests(arguments, words):
    with pytest.raises(UsageError) as caught:
        select(ranking(), Request(**arguments))
    assert words in str(caught.value)


def test_a_ranking_without_parts_can_not_be_recombined():
    made = ranking()
    for site in made.sites:
        site.columns, site.trajectory = [], np.zeros((site.units, 0))
    with pytest.raises(UsageError, match="no parts"):
        select(made, Request(flops=0.5, output_weight=0.5))
