"""Heads and ranks together: against every choice there is, under each kind of budget."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace

import numpy as np
import pytest
from helpers.runs import examples
from helpers.selection import FIXED_PARAMS, WIDTH, macs_of, ranking, with_ranks
from hypothesis import given
from hypothesis import strategies as st

from optin_cli.artefacts.sketch import Sketch
from optin_cli.artefacts.token_ranking import RankedTokens
from optin_cli.importance import combine
from optin_cli.selection.problem import pose
from optin_cli.selection.ranks import STEP, rank_losses
from optin_cli.selection.select import select
from optin_cli.selection.settings import Request


def sketch_of(made, rows=40, seed=0):
    """Gradients drawn at random, of all units."""
    rng = np.random.default_rng(seed)
    parts = (
        {s.name: rng.normal(size=(rows, s.units)).astype(np.float32) for s in made.sites} for _ in range(2)
    )
    return Sketch(np.arange(rows), *parts)


def best_by_hand(made, budget: float, request: Request) -> float:
    """The largest kept score of all choices of heads, ranks and neurons whose MACs fit."""
    problem = pose(made, request)
    losses = rank_losses(made, problem.weighting[1], problem.weighting[0])
    options = []
    for site, scores in zip(problem.sites, problem.scores, strict=True):
        best = np.concatenate([[0.0], np.cumsum(-np.sort(-scores))])
        if site.kind == "heads":
            loss = losses[site.name]
            pairs = itertools.product(range(site.units + 1), [*range(STEP, WIDTH, STEP), WIDTH])
            options.append(
                [
                    (best[h] * max(0.0, 1 - loss[r] / best[-1]), h * r / WIDTH * site.macs_per_unit(10.0))
                    for h, r in pairs
                ]
            )
        else:
            options.append([(best[n], n * site.macs_per_unit(10.0)) for n in range(site.units + 1)])
    room = budget * made.dense_macs(10.0) * (1 + 1e-12)
    return max(
        sum(gain for gain, _ in choice)
        for choice in itertools.product(*options)
        if sum(cost for _, cost in choice) <= room
    )


@examples(25)
@given(st.integers(0, 10_000), st.floats(0.05, 1.0), st.sampled_from([(1, 1), (1, 3)]))
def test_the_mask_is_the_best_of_all_choices(seed, budget, widths):
    made = with_ranks(ranking(blocks=2, heads=3, neurons=4, seed=seed, widths=widths), seed)
    request = Request(flops=budget, output_weight=0.3, feature_weights="sum")
    mask = select(made, request)
    everything = sum(float(scores.sum()) for scores in pose(made, request).scores)
    best = best_by_hand(made, budget, request) / everything
    assert mask.objective["kept"] <= best + 1e-9
    assert mask.objective["bound"] >= best - 1e-9
    if mask.objective["optimal"]:
        assert mask.objective["kept"] == pytest.approx(best)
    assert best - mask.objective["kept"] <= mask.objective["gap"] + 1e-9
    assert mask.reached["flops"] <= budget * (1 + 1e-9)
    assert set(mask.ranks.values()) <= set(range(STEP, WIDTH))


@examples(25)
@given(st.integers(0, 10_000), st.floats(0.1, 1.0))
def test_what_a_mask_reaches_counts_heads_times_rank(seed, budget):
    made = with_ranks(ranking(seed=seed), seed)
    mask = select(made, budget)
    sizes = {
        site.name: len(mask.keep[site.name]) * mask.ranks.get(site.name, WIDTH) / WIDTH for site in made.sites
    }
    macs = sum(sizes[site.name] * site.macs_per_unit(10.0) for site in made.sites)
    params = FIXED_PARAMS + sum(sizes[site.name] * site.params_per_unit for site in made.sites)
    assert mask.reached["macs"] == pytest.approx(macs)
    assert mask.reached["params"] == pytest.approx(params)
    assert all(rank and mask.keep[name] for name, rank in mask.ranks.items())


@pytest.mark.parametrize("budgets", [{"params": 0.7}, {"flops": 0.5, "params": 0.7}, {"memory": 0.7}])
def test_other_budgets_hold_with_ranks(budgets):
    made = with_ranks(ranking(blocks=4, seed=3))
    whole = 4 * made.dense["params"] / 2**20  # MiB
    amounts = {name: share * whole if name == "memory" else share for name, share in budgets.items()}
    mask = select(made, Request(**amounts))
    assert mask.ranks
    for name, amount in amounts.items():
        used = mask.reached[name] / mask.reached["dense_params"] if name == "params" else mask.reached[name]
        assert used <= amount * (1 + 1e-9)


def test_ranks_keep_more_than_whole_heads_do():
    made = with_ranks(ranking(blocks=4, seed=3))
    for budget in (0.7, 0.5, 0.3):
        both, whole = (select(made, Request(flops=budget, ranks=ranks)) for ranks in (True, False))
        assert both.objective["kept"] >= whole.objective["kept"]
        assert not whole.ranks
        assert macs_of(made, whole) <= budget * made.dense_macs(10.0)


def test_a_ranking_without_ranks_gives_whole_heads_and_says_so(caplog):
    made = ranking()
    with caplog.at_level(logging.WARNING, "optin"):
        assert select(made, Request(flops=0.5)) == select(made, Request(flops=0.5, ranks=False))
        assert not caplog.messages
        assert select(made, Request(flops=0.5, ranks=True)).ranks == {}
    assert "does not say what lower ranks of heads cost, so that heads stay whole" in caplog.messages[0]


def test_guards_and_rounding_hold_for_ranks():
    made = with_ranks(ranking())
    protected = select(made, Request(flops=0.4, protect=("blocks.1.*",)))
    assert "blocks.1.heads" not in protected.ranks
    assert len(protected.keep["blocks.1.heads"]) == 4
    assert not select(made, Request(flops=0.8, only="neurons")).ranks
    assert not select(made, Request(flops=0.5, round_to=WIDTH)).ranks
    few = select(made, Request(flops=0.75, max_prune=0.4))
    for site in made.sites:
        left = len(few.keep[site.name]) * (few.ranks.get(site.name, WIDTH) if site.kind == "heads" else 1)
        assert left >= 0.6 * site.units * (WIDTH if site.kind == "heads" else 1) - 1e-9


def test_losses_are_on_the_scale_of_the_scores_and_never_rise():
    made = with_ranks(ranking())
    losses = rank_losses(made, 0.3, "sum")["blocks.0.heads"]
    one, site = made.rank_sites[0], made.sites[0]
    as_units = replace(site, units=WIDTH, trajectory=one.trajectory, output=one.output)
    rest = combine([*made.sites], 0.3, "sum")[site.name]
    scale = (rest - site.trajectory.sum(1)) / site.output
    np.testing.assert_allclose(losses[:-1], as_units.trajectory.sum(1) + scale[0] * as_units.output)
    assert losses[-1] == 0
    assert (np.diff(losses) <= 0).all()


def test_heads_that_lose_nothing_go_to_the_lowest_rank_first():
    made = with_ranks(ranking(), zero=True)
    mask = select(made, Request(flops=0.7))
    assert mask.objective["kept"] <= 1
    assert mask.reached["flops"] <= 0.7


def test_exchanges_keep_the_number_and_the_rank_of_heads_that_are_cut():
    made = with_ranks(ranking(blocks=4, seed=3))
    for scope in ("layer", "global"):
        plain = select(made, Request(flops=0.5))
        moved = select(made, Request(flops=0.5, interactions=scope), sketch_of(made))
        assert moved.ranks == plain.ranks
        assert moved.reached["flops"] <= 0.5
        for site in made.sites:
            if site.kind == "heads":
                assert len(moved.keep[site.name]) == len(plain.keep[site.name])


def test_tokens_and_ranks_are_chosen_together():
    made = with_ranks(ranking(blocks=4, seed=3))
    tokens = [
        RankedTokens(
            block, [1, 2, 4], [1, 2], np.array([[1.0, 1.0], [5.0, 5.0], [30.0, 30.0]]), np.full(3, 0.1)
        )
        for block in range(3)
    ]
    made = replace(made, token_sites=tokens)
    both = select(made, Request(flops=0.4, merge="joint"))
    alone = select(made, Request(flops=0.4))
    assert both.ranks
    assert both.reached["flops"] <= 0.4 * (1 + 1e-9)
    net = both.objective["kept"] - both.objective["merging"]
    assert net >= alone.objective["kept"] - 1e-9
    assert both.objective["bound"] >= net - 1e-9
