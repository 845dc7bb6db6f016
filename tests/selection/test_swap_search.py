"""Swaps of units by what they cost together: losses and gains against their definition and brute force."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from helpers.interactions import EXAMPLES, exchanged, joint, made, sketch_of
from helpers.runs import examples
from hypothesis import given
from hypothesis import strategies as st

from optin_cli.artefacts.sketch import Sketch
from optin_cli.selection.interactions import halves
from optin_cli.selection.problem import pose
from optin_cli.selection.settings import Request
from optin_cli.selection.swap_search import Exchange, Pool


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
