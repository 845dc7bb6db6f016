"""Selection: budgets hold, what is kept is the best, wrong requests are refused."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from helpers.artefacts import latency_table
from helpers.runs import examples
from helpers.selection import FIXED_PARAMS, kept, macs_of, params_of, ranking
from hypothesis import given
from hypothesis import strategies as st

from optin_cli.artefacts.mask import mask_to_json
from optin_cli.errors import BudgetError, UsageError
from optin_cli.importance import combine
from optin_cli.selection.budgets import MIB
from optin_cli.selection.select import emptied_sites, select
from optin_cli.selection.settings import Request


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
    with pytest.raises(BudgetError, match=r"memory=0.01 can't be met") as caught:
        select(ranking(), Request(memory=0.01))
    smallest = float(re.search(r"memory=([\d.]+)", caught.value.hint)[1])
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
    told = re.findall(r"(\w+?)(?:_(ms))?=([\d.]+)", caught.value.hint.split(";")[0])
    changes = {name + ("_ms" if unit else ""): float(number) for name, unit, number in told}
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
    assert (asked["min_heads"], asked["max_prune"], asked["round_to"]) == (1, 0.8, "auto")
    assert asked["latency_table"]["digest"] == table.digest
    assert asked["latency_table"]["batch_size"] == table.setting["batch_size"]


# bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"flops": 0}, "flops=0 is"),
        ({"flops": -0.5}, "flops=-0.5"),
        ({"flops": 1.01}, "flops=1.01"),
        ({"flops": float("nan")}, "flops=nan"),
        ({"params": 2}, "params=2"),
        ({"latency": 0}, "latency=0"),
        ({"memory": 0}, "memory=0"),
        ({"memory": float("inf")}, "memory=inf"),
        ({"latency_ms": float("nan")}, "latency_ms=nan"),
        ({}, "no budget"),
        ({"latency": 0.5}, "latency_table=FILE"),
        ({"latency_ms": 5}, "latency_table=FILE"),
        ({"flops": 0.5, "relative_to": "moon"}, "relative_to"),
        ({"flops": 0.5, "tokens": 0}, "tokens"),
        ({"flops": 0.5, "output_weight": -1}, "output_weight="),
        ({"flops": 0.5, "protect": ("nothing.*",)}, "matches no site"),
        ({"flops": 0.5, "min_heads": -1}, "negative"),
        ({"flops": 0.5, "max_prune": 1.5}, "max_prune="),
        ({"flops": 0.5, "only": "wheels"}, "it has heads, neurons"),
        ({"flops": 0.5, "round_to": 0}, "round_to="),
        ({"flops": 0.5, "round_to": "many"}, "round_to="),
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
