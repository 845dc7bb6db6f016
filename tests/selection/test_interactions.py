"""Exchanging units for their interactions: against brute force, within all budgets, and only where it is real."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from helpers.artefacts import latency_table
from helpers.runs import examples
from hypothesis import given
from hypothesis import strategies as st

from optin_cli.artefacts.ranking import RankedSite, Ranking, combine
from optin_cli.artefacts.sketch import Sketch
from optin_cli.errors import UsageError
from optin_cli.selection.exchange import Exchange, Pool
from optin_cli.selection.interactions import Half, halves, rearrange
from optin_cli.selection.problem import pose
from optin_cli.selection.request import Request
from optin_cli.selection.select import select
from optin_cli.selection.solver import solve

EXAMPLES = 160


def made(blocks: int = 2, heads: int = 3, neurons: int = 12, seed: int = 0, widths=(1, 1, 1)) -> Ranking:
    """A ranking whose parts are what `sketch_of` holds."""
    rng = np.random.default_rng(seed)
    sites = []
    for block in range(blocks):
        for kind, units, cost in (("heads", heads, 500), ("neurons", neurons, 100)):
            cost *= widths[block]
            trajectory = rng.lognormal(0, 0.5, (units, 1))
            site = RankedSite(
                f"blocks.{block}.{kind}", kind, block, units, 8, cost, 0, cost + 1, trajectory.sum(1), trajectory,
                rng.lognormal(1, 0.5, units), [blocks - 1],
            )  # fmt: skip
            sites.append(site)
    macs = sum(s.units * s.macs_per_token for s in sites)
    params = sum(s.units * s.params_per_unit for s in sites)
    ranking = Ranking(
        model={"digest": "d", "family": "f", "id": "m", "task": "t", "class": "c"},
        data={"fingerprint": "f", "spec": "s", "split": "train"},
        row_ids=[0],
        method="curvature",
        settings={"output_weight": 1.0, "recombines": True},
        tokens=10.0,
        dense={
            "params": params + 1000,
            "site_params": params,
            "macs_per_token": macs,
            "macs_per_pair": 0,
            "dtype": "float32",
        },
        sites=sites,
    )
    for site in sites:
        site.score = combine(sites, 1.0)[site.name]
    return ranking


def sketch_of(ranking: Ranking, rank: int = 3, noise: float = 0.3, seed: int = 0, probes: int = 1) -> Sketch:
    """Gradients that a few directions explain, the same ones in every example, and noise; rank 0: noise alone."""
    rng = np.random.default_rng(seed)
    numbers = np.repeat(np.arange(EXAMPLES), probes)
    directions = rng.normal(size=(len(numbers), rank))
    parts = []
    for part in ("trajectory", "output"):
        found = {}
        for site in ranking.sites:
            worth = site.trajectory.sum(1) if part == "trajectory" else site.output
            rows = directions @ rng.normal(size=(rank, site.units)) / max(rank, 1) ** 0.5
            rows = rows + noise * rng.normal(size=rows.shape)
            found[site.name] = (rows * np.sqrt(worth / (rows**2).sum(0))).astype(np.float32)
        parts.append(found)
    return Sketch(numbers, *parts)


def posed(ranking: Ranking, request: Request):
    problem = pose(ranking, request)
    solution = solve(problem.ladders, problem.capacities)
    return problem, problem.keep(solution.counts)


def exchanged(ranking: Ranking, request: Request, sketch: Sketch, scope: str, ridge: float = 1.0):
    problem, keep = posed(ranking, request)
    fit, check = halves(problem.sites, problem.scores, sketch)
    found = rearrange(keep, problem.scores, problem.ladders, problem.capacities, fit, check, scope, ridge)
    return problem, keep, fit, check, found


def joint(problem, keep, half: Half, ridge: float) -> float:
    """The loss as METHOD section 5 writes it: row by row, no Gram, no bookkeeping."""
    total, loss, start = 0.0, 0.0, 0
    removed = []
    for site, scores in zip(problem.sites, problem.scores, strict=True):
        gone = [u for u in range(site.units) if u not in set(keep[site.name])]
        removed += [start + u for u in gone]
        loss += ridge * sum(scores[u] for u in gone)
        total += scores.sum()
        start += site.units
    for row in range(half.rows.shape[1]):
        loss += sum(float(half.rows[u, row]) for u in removed) ** 2
    return loss / total


# ---- the loss and the gains ----


def test_each_half_adds_up_to_the_scores():
    ranking = made()
    problem = pose(ranking, Request(flops=0.5))
    for half in halves(problem.sites, problem.scores, sketch_of(ranking)):
        assert (half.rows.astype(float) ** 2).sum(1) == pytest.approx(
            np.concatenate(problem.scores), rel=1e-5
        )


def test_examples_are_on_one_side_with_their_neighbour_whatever_their_rows():
    ranking = made()
    sketch = sketch_of(ranking, probes=3)
    shuffled = np.random.default_rng(0).permutation(len(sketch))
    parts = [{n: a[shuffled] for n, a in part.items()} for part in (sketch.trajectory, sketch.output)]
    problem = pose(ranking, Request(flops=0.5))
    fit, check = halves(problem.sites, problem.scores, Sketch(sketch.examples[shuffled], *parts))
    assert not set(fit.examples // 2) & set(check.examples // 2)
    assert len(fit.examples) == len(check.examples) == 2 * 3 * EXAMPLES / 2  # both terms
    one = np.flatnonzero(fit.examples == 5 if 5 in fit.examples else check.examples == 5)
    assert len(one) == 6


@examples(40)
@given(st.integers(0, 99), st.floats(0.2, 0.8), st.sampled_from(["layer", "global"]), st.floats(0, 3))
def test_losses_are_what_the_definition_says_and_never_grow(seed, flops, scope, ridge):
    ranking = made(seed=seed)
    problem, keep, fit, check, found = exchanged(
        ranking, Request(flops=flops), sketch_of(ranking, seed=seed), scope, ridge
    )
    assert found.fit[0] == pytest.approx(joint(problem, keep, fit, ridge), rel=1e-5)
    assert found.held_out[0] == pytest.approx(joint(problem, keep, check, 0.0), rel=1e-5)
    if not found.dropped:
        assert found.fit[1] == pytest.approx(joint(problem, found.keep, fit, ridge), rel=1e-4, abs=1e-9)
        assert found.held_out[1] == pytest.approx(joint(problem, found.keep, check, 0.0), rel=1e-4, abs=1e-9)
        assert found.fit[1] <= found.fit[0]
        assert found.held_out[1] <= found.held_out[0]
    assert (found.moved > 0) == (found.keep != keep)


def plain_exchange(units: int, rows: int, seed: int, scale: float = 1.0):
    """An exchange of one site, half of it removed."""
    rng = np.random.default_rng(seed)
    g = rng.normal(size=(units, rows)).astype(np.float32) * scale
    diagonal = 1.3 * (g.astype(float) ** 2).sum(1)
    removed = np.arange(units) % 2 == 0
    site = np.zeros(units, dtype=np.intp)
    return Exchange(g, diagonal, removed, site, np.zeros(1, dtype=np.intp), np.zeros(1)), g, diagonal


def loss_of(g, diagonal, removed) -> float:
    g = g.astype(float)[removed]
    return float((g.sum(0) ** 2).sum() + (diagonal[removed] - (g**2).sum(1)).sum())


@examples(30)
@given(st.integers(0, 999), st.integers(2, 14), st.integers(1, 9))
def test_at_the_end_no_swap_helps(seed, units, rows):
    exchange, g, diagonal = plain_exchange(units, rows, seed)
    start = loss_of(g, diagonal, exchange.removed)
    for _ in exchange.improve([Pool(np.arange(units), None)]):
        assert exchange.loss() == pytest.approx(loss_of(g, diagonal, exchange.removed), rel=1e-4, abs=1e-4)
    end = loss_of(g, diagonal, exchange.removed)
    assert end <= start
    assert exchange.removed.sum() == (units + 1) // 2
    for out, back in product(np.flatnonzero(~exchange.removed), np.flatnonzero(exchange.removed)):
        other = exchange.removed.copy()
        other[out], other[back] = True, False
        assert loss_of(g, diagonal, other) >= end - 1e-4 * start


@examples(25)
@given(st.integers(0, 999), st.integers(1, 4))
def test_the_first_swap_is_the_best_there_is(seed, rows):
    """With a shortlist of one swap: the greedy choice against all pairs."""
    exchange, g, diagonal = plain_exchange(9, rows, seed)
    start, removed = loss_of(g, diagonal, exchange.removed), exchange.removed.copy()
    best = start
    for out, back in product(np.flatnonzero(~removed), np.flatnonzero(removed)):
        other = removed.copy()
        other[out], other[back] = True, False
        best = min(best, loss_of(g, diagonal, other))
    losses = [start]
    move = exchange._move

    def moved(out, back):
        move(out, back)
        losses.append(loss_of(g, diagonal, exchange.removed))

    exchange._move = moved
    for _ in exchange.improve([Pool(np.arange(9), None)]):
        pass
    assert losses == sorted(losses, reverse=True)
    if best < start * (1 - 1e-3):
        assert losses[1] == pytest.approx(best, rel=1e-4, abs=1e-4)


@examples(40)
@given(st.integers(0, 999), st.sampled_from([2.0, 2.5, 3.7]), st.floats(0, 3))
def test_a_dear_unit_is_traded_for_as_many_cheap_ones_as_it_pays_for(seed, price, room):
    """Three dear units against cheap ones: whatever is traded stays within the budget and lowers the loss."""
    rng = np.random.default_rng(seed)
    dear, cheap, rows = 3, 16, 6
    # dear units are worth more, or less, than their price in cheap ones
    g = (0.3 + rng.random((dear + cheap, rows))).astype(np.float32) * (0.2 if seed % 2 else 1)
    g[:dear] = 3 * price * np.eye(rows)[:dear] * (1 if seed % 2 else 0.01)
    diagonal = 1.1 * (g.astype(float) ** 2).sum(1)
    site = np.array([0] * dear + [1] * cheap)
    cost = np.where(site == 0, price, 1.0)
    removed = np.zeros(dear + cheap, dtype=bool)
    removed[[0, 1] if seed % 2 else [*range(dear, dear + 6)]] = True
    exchange = Exchange(g, diagonal, removed, site, np.zeros(2, dtype=np.intp), np.array([room]))
    pools = [Pool(np.flatnonzero(site == s), np.array([c])) for s, c in ((0, price), (1, 1.0))]
    start, capacity = loss_of(g, diagonal, removed), cost[~removed].sum() + room
    for _ in exchange.improve(pools):
        used = cost[~exchange.removed].sum()
        assert used <= capacity + 1e-9
        assert exchange.room[0] == pytest.approx(capacity - used)
    assert loss_of(g, diagonal, exchange.removed) < start
    assert exchange.removed[:dear].sum() < 2 if seed % 2 else exchange.removed[:dear].any()


@examples(30)
@given(st.integers(0, 999), st.integers(0, 6))
def test_a_site_at_its_minimum_still_exchanges_its_own_units(seed, least):
    """Two sites of eight units, half of each kept: at the end no swap that the minimum allows helps."""
    rng = np.random.default_rng(seed)
    g = rng.normal(size=(16, 5)).astype(np.float32)
    diagonal = 1.2 * (g.astype(float) ** 2).sum(1)
    site, removed = np.arange(16) // 8, np.arange(16) % 2 == 0
    minima = np.array([min(least, 4), 4])
    exchange = Exchange(g, diagonal, removed, site, minima, np.zeros(1))
    start = loss_of(g, diagonal, removed)
    for _ in exchange.improve([Pool(np.arange(16), np.ones(1))]):
        pass
    kept = [int((~exchange.removed)[site == s].sum()) for s in (0, 1)]
    assert kept[0] >= minima[0] and kept[1] >= 4 and sum(kept) == 8
    end = loss_of(g, diagonal, exchange.removed)
    for out, back in product(np.flatnonzero(~exchange.removed), np.flatnonzero(exchange.removed)):
        if site[out] == site[back] or kept[site[out]] > minima[site[out]]:
            other = exchange.removed.copy()
            other[out], other[back] = True, False
            assert loss_of(g, diagonal, other) >= end - 1e-4 * start


# ---- what it must find ----


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
    if solve(pose(ranking, request).ladders, pose(ranking, request).capacities) is None:
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
    with pytest.raises(UsageError, match="--interactions pairs"):
        select(ranking, Request(flops=0.5, interactions="pairs"))
