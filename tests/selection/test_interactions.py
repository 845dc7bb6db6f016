"""Interactions: what an exchange must find, keep to and record."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.artefacts import latency_table
from helpers.interactions import EXAMPLES, exchanged, joint, made, posed, sketch_of
from helpers.runs import examples
from hypothesis import given
from hypothesis import strategies as st

from optin_cli.artefacts.sketch import Sketch
from optin_cli.errors import UsageError
from optin_cli.selection.problem import pose
from optin_cli.selection.select import select
from optin_cli.selection.settings import Request
from optin_cli.selection.solver import solve


def test_of_two_identical_neurons_one_is_kept():
    """Removing both costs four times one of them, not twice: the sum of scores can't see it."""
    ranking = made(blocks=1, heads=0, neurons=10)
    site = ranking.sites[-1]
    site.trajectory[:, 0] = site.output[:] = site.score[:] = [1, 1, 1.6, *[9] * 7]
    rows = np.random.default_rng(0).normal(size=(EXAMPLES, 10)) * 0.05
    rows[:, 0] = rows[:, 1] = np.where(np.arange(EXAMPLES) // 4 % 2, 1, -1)
    rows[:, 2] = np.where(np.arange(EXAMPLES) // 8 % 2, 1, -1)
    sketch = Sketch(
        np.arange(EXAMPLES), {site.name: rows.astype(np.float32)}, {site.name: rows.astype(np.float32)}
    )
    request = Request(flops=0.8, only="neurons")
    assert set(range(10)) - set(select(ranking, request).keep[site.name]) == {0, 1}
    gone = set(range(10)) - set(exchanged(ranking, request, sketch, "layer")[-1].keep[site.name])
    assert gone in ({0, 2}, {1, 2})


def test_a_pair_that_cancels_goes_together():
    ranking = made(blocks=1, heads=0, neurons=10)
    site = ranking.sites[-1]
    site.trajectory[:, 0] = site.output[:] = site.score[:] = [1, 1.2, 1.1, 1.1, *[9] * 6]
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(EXAMPLES, 10))
    rows[:, 3] = -rows[:, 2]
    sketch = Sketch(np.arange(EXAMPLES), {}, {site.name: rows.astype(np.float32)})
    request = Request(flops=0.8, only="neurons")
    assert set(range(10)) - set(select(ranking, request).keep[site.name]) == {0, 3}
    found = exchanged(ranking, request, sketch, "layer", ridge=0.0)[-1]
    assert set(range(10)) - set(found.keep[site.name]) == {2, 3}
    assert found.held_out[1] < 1e-6 < found.held_out[0]


def test_global_moves_budget_between_layers():
    """Block 0 loses twins, block 1 has spare units that interact with nothing: only `global` can trade them."""
    ranking = made(blocks=2, heads=0, neurons=8)
    rng = np.random.default_rng(2)
    rows = {}
    for site, scores in zip(
        ranking.sites[1::2], ([1, 1, 1, 1, 9, 9, 9, 9], [2, 2, 2, 2, 9, 9, 9, 9]), strict=True
    ):
        site.trajectory[:, 0] = site.output[:] = site.score[:] = scores
        rows[site.name] = rng.normal(size=(200, 8)).astype(np.float32)
    for unit in (1, 2, 3):
        rows["blocks.0.neurons"][:, unit] = rows["blocks.0.neurons"][:, 0]
    sketch = Sketch(np.arange(200), {}, rows)
    request = Request(flops=0.75, only="neurons")
    start = select(ranking, request)
    assert len(start.keep["blocks.0.neurons"]) == 4
    inside = exchanged(ranking, request, sketch, "layer", ridge=0.0)[-1]
    across = exchanged(ranking, request, sketch, "global", ridge=0.0)[-1]
    assert len(inside.keep["blocks.0.neurons"]) == 4
    assert len(across.keep["blocks.0.neurons"]) > 4
    assert across.held_out[1] < inside.held_out[1]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_what_is_noise_on_held_out_examples_is_dropped(scope):
    """No interactions at all, few rows, no ridge: the fit half always finds a gain, and it is never real."""
    for seed in range(8):
        ranking = made(neurons=60, seed=seed)
        sketch = sketch_of(ranking, rank=0, noise=1.0, seed=seed)
        _, keep, _, _, found = exchanged(ranking, Request(flops=0.5), sketch, scope, ridge=0.0)
        assert found.dropped
        assert found.fit[1] < 0.7 * found.fit[0]  # it did look real
        assert (found.keep, found.moved) == (keep, 0)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_what_holds_on_held_out_examples_is_kept(scope):
    for seed in range(4):
        ranking = made(neurons=60, seed=seed)
        sketch = sketch_of(ranking, rank=2, noise=0.2, seed=seed)
        *_, found = exchanged(ranking, Request(flops=0.5), sketch, scope)
        assert not found.dropped
        assert found.held_out[1] < 0.5 * found.held_out[0]
        assert found.held_out[0] - found.held_out[1] > 3 * found.error


def test_one_example_can_not_confirm_anything():
    ranking = made(neurons=30)
    sketch = sketch_of(ranking)
    for few in ([0], [0, 1], [2, 3], []):
        rows = np.flatnonzero(np.isin(sketch.examples, few))
        parts = [{n: a[rows] for n, a in part.items()} for part in (sketch.trajectory, sketch.output)]
        *_, found = exchanged(ranking, Request(flops=0.5), Sketch(sketch.examples[rows], *parts), "global")
        assert found.moved == 0


def test_a_unit_without_gradients_counts_with_its_score():
    ranking = made()
    sketch = sketch_of(ranking)
    for part in (sketch.trajectory, sketch.output):
        part["blocks.0.neurons"][:] = 0
    problem, keep, fit, _, found = exchanged(ranking, Request(flops=0.5), sketch, "global", ridge=0.0)
    alone = sum(problem.scores[1][u] for u in range(12) if u not in keep["blocks.0.neurons"])
    total = sum(s.sum() for s in problem.scores)
    assert problem.sites[1].name == "blocks.0.neurons"
    assert found.fit[0] == pytest.approx(joint(problem, keep, fit, 0.0) + alone / total, rel=1e-5)


def test_a_ranking_of_output_alone_needs_no_trajectory():
    """Fisher: PTF's own rearrangement."""
    ranking = made(neurons=40)
    for site in ranking.sites:
        site.columns, site.trajectory = [], np.zeros((site.units, 0))
        site.score = site.output.copy()
    sketch = sketch_of(made(neurons=40), rank=2, noise=0.1)
    mask = select(
        ranking, Request(flops=0.5, interactions="global"), Sketch(sketch.examples, {}, sketch.output)
    )
    assert mask.objective["interactions"]["moved"] > 0


# ---- budgets and guards ----


@examples(40)
@given(
    st.integers(0, 99), st.floats(0.25, 0.9), st.floats(0.3, 1), st.sampled_from([(1, 1), (1, 2), (3, 1)]),
    st.sampled_from([1, 4]), st.integers(0, 2), st.sampled_from(["layer", "global"]),
)  # fmt: skip
def test_every_budget_and_guard_still_holds(seed, flops, params, widths, size, least, scope):
    ranking = made(seed=seed, widths=widths)
    request = Request(
        flops=flops, params=params, round_to=size, min_heads=least, min_neurons=2 * least, max_prune=0.9,
        protect=("blocks.1.heads",), interactions=scope,
    )  # fmt: skip
    if solve(pose(ranking, request).site_sizes, pose(ranking, request).capacities) is None:
        return
    start = posed(ranking, request)[1]
    mask = select(ranking, request, sketch_of(ranking, seed=seed, rank=2, noise=0.1))
    assert mask.reached["flops"] <= flops * (1 + 1e-9)
    assert mask.reached["params"] <= params * ranking.dense["params"] * (1 + 1e-9)
    assert len(mask.keep["blocks.1.heads"]) == 3
    for site in ranking.sites:
        count, before = len(mask.keep[site.name]), len(start[site.name])
        assert count >= min(site.units, least if site.kind == "heads" else 2 * least)
        assert count >= site.units * 0.1
        assert mask.keep[site.name] == sorted(set(mask.keep[site.name]))
        if scope == "layer" or (site.kind == "neurons" and size > 1):
            assert count == before


def test_the_guards_bind_somewhere():
    """The property test above would prove little if nothing moved between layers under its requests."""
    moved = 0
    for seed in range(10):
        ranking = made(seed=seed)
        request = Request(flops=0.5, min_heads=1, min_neurons=2, interactions="global")
        mask = select(ranking, request, sketch_of(ranking, seed=seed, rank=2, noise=0.1))
        start = posed(ranking, request)[1]
        moved += any(len(mask.keep[name]) != len(units) for name, units in start.items())
    assert moved >= 3


def test_a_latency_budget_keeps_the_sizes():
    ranking = made(neurons=30)
    table = latency_table(ranking.sites, step=5)
    request = Request(latency=0.6, table=table, interactions="global")
    start = posed(ranking, request)[1]
    mask = select(ranking, request, sketch_of(ranking, rank=2, noise=0.1))
    assert mask.objective["interactions"]["moved"] > 0
    assert {n: len(k) for n, k in mask.keep.items()} == {n: len(k) for n, k in start.items()}


# ---- the mask ----


def test_the_mask_records_what_was_done():
    ranking = made(neurons=40)
    sketch = sketch_of(ranking, rank=2, noise=0.1)
    plain = select(ranking, Request(flops=0.5))
    mask = select(ranking, Request(flops=0.5, interactions="layer"), sketch)
    found = mask.objective["interactions"]
    assert mask.budget["interactions"] == "layer"
    assert found["moved"] == 2 * sum(len(set(plain.keep[n]) - set(k)) for n, k in mask.keep.items())
    assert found["fit"]["after"] < found["fit"]["before"]
    assert mask.objective["kept"] < plain.objective["kept"]
    assert plain.objective["optimal"] and not mask.objective["optimal"]
    assert plain.objective["interactions"] is None
    assert select(ranking, Request(flops=0.5, interactions="layer"), sketch) == mask
    assert select(ranking, Request(flops=0.5), sketch) == plain


def test_without_a_sketch_interactions_are_refused():
    ranking = made()
    for sketch in (None, Sketch(np.zeros(0, dtype=np.int64))):
        with pytest.raises(UsageError, match="no sketch"):
            select(ranking, Request(flops=0.5, interactions="layer"), sketch)
    with pytest.raises(UsageError, match="interactions='pairs'"):
        select(ranking, Request(flops=0.5, interactions="pairs"))
