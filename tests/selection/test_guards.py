"""Selection's guards and rounding."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from helpers.artefacts import latency_table
from helpers.runs import examples
from helpers.selection import kept, macs_of, ranking
from hypothesis import given
from hypothesis import strategies as st

from optin_cli.errors import BudgetError
from optin_cli.selection.select import select
from optin_cli.selection.settings import Request, round_size


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
    [
        ("cpu", "float32", 8),
        ("cpu", "bfloat16", 8),
        ("NVIDIA H100", "bfloat16", 64),
        ("NVIDIA H100", "float16", 64),
        ("NVIDIA H100", "float32", 32),
    ],
)
def test_auto_rounds_for_the_device(device, dtype, size):
    made = ranking()
    made.device, made.dtype = device, dtype
    assert round_size(Request(flops=0.5, round_to="auto"), made) == size
    table = latency_table(made.sites, device=device, dtype=dtype)
    made.device = "cpu"
    assert round_size(Request(flops=0.5, round_to="auto", table=table), made) == size


def test_auto_rounds_for_the_dtype_that_the_model_is_stored_in():
    """Scores of a model in half precision are computed in float32."""
    made = ranking()
    made.device, made.dtype, made.dense["dtype"] = "NVIDIA H100", "float32", "bfloat16"
    assert round_size(Request(flops=0.5, round_to="auto"), made) == 64


@pytest.mark.parametrize(
    ("kind", "units", "width", "dtype", "expected"),
    [
        ("neurons", 3072, 1, "bfloat16", 64),
        ("neurons", 3072, 1, "float32", 32),
        ("neurons", 3072, 1, "cpu", 8),
        ("channels", 64, 1, "cpu", 8),
        ("neurons", 63, 1, "cpu", 1),  # 8 would leave fewer than eight sizes
        ("heads", 12, 32, "cpu", 1),
        ("heads", 16, 2, "cpu", 4),
        ("heads", 6, 33, "cpu", 1),
        ("neurons", 300, 1, "bfloat16", 32),  # 64 would leave fewer than eight sizes
        ("channels", 64, 1, "bfloat16", 8),
        ("channels", 16, 1, "bfloat16", 8),
        ("channels", 16, 1, "float32", 4),
        ("heads", 12, 64, "bfloat16", 1),
        ("heads", 12, 32, "bfloat16", 2),
        ("heads", 12, 32, "float32", 1),
        ("heads", 16, 80, "bfloat16", 4),
        ("heads", 16, 72, "bfloat16", 4),  # 8 heads would be 576 features, and leave two sizes
        ("heads", 4, 16, "bfloat16", 1),
        ("heads", 6, 33, "bfloat16", 1),
    ],
)
def test_auto_rounds_the_features_of_a_site(kind, units, width, dtype, expected):
    """Oracle: the fewest units whose features are a multiple of the largest power of two that leaves enough sizes."""
    made = ranking()
    made.device, made.dtype = ("cpu", "float32") if dtype == "cpu" else ("NVIDIA H100", dtype)
    request = Request(flops=0.5, round_to="auto")
    site = replace(made.sites[0], kind=kind, units=units, width=width)
    assert request.multiple(site, round_size(request, made)) == expected


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 64), ("float32", 32)])
def test_a_mask_with_auto_keeps_such_features(dtype, size):
    made = ranking(heads=8, neurons=96)
    made.device, made.dtype = "NVIDIA H100", dtype
    for site in made.sites:
        site.width = 8 if site.kind == "heads" else 1
    request = Request(flops=0.6, round_to="auto")
    mask = select(made, request)
    counts = kept(mask)
    for site in made.sites:
        multiple = request.multiple(site, size)
        assert multiple > 1
        assert counts[site.name] % multiple == 0 or counts[site.name] == site.units
    exact = kept(select(made, Request(flops=0.6, round_to=1)))
    assert any(
        count % request.multiple(site, size) for site, count in zip(made.sites, exact.values(), strict=True)
    )
