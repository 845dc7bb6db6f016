"""Schedules of merges found with the mask: against brute force, weights alone and tokens alone."""

from __future__ import annotations

import dataclasses
from itertools import product

import numpy as np
import pytest
from helpers.artefacts import tiny_ranking
from helpers.runs import examples
from hypothesis import given
from hypothesis import strategies as st

from optin_cli.artefacts.ranking import Ranking
from optin_cli.artefacts.token_ranking import RankedTokens
from optin_cli.errors import BudgetError, UsageError
from optin_cli.importance import combine
from optin_cli.selection.problem import pose
from optin_cli.selection.select import select
from optin_cli.selection.settings import Request
from optin_cli.selection.token_merging import boundaries_of, merge_losses
from optin_cli.structure.merge_schedule import tokens_by_block

TOKENS, PREFIX = 9, 1


def ranking(seed: int = 0, dear: float = 1.0, blocks: int = 3, heads: int = 2, neurons: int = 3) -> Ranking:
    """A tiny vision model; `dear` scales what merging loses against what units score."""
    rng = np.random.default_rng(seed)
    found = tiny_ranking(blocks, heads, neurons, seed, tokens=float(TOKENS))
    tokens = []
    for block in range(blocks - 1):
        columns = list(range(block + 1, blocks))
        parts = np.sort(rng.exponential(dear, (3, len(columns) + 1)), axis=0)
        tokens.append(RankedTokens(block, [1, 2, 4], columns, parts[:, 1:], parts[:, 0]))
    settings = {**found.settings, "output_weight": 1.0}
    model = {**found.model, "prefix": PREFIX}
    return dataclasses.replace(found, token_sites=tokens, settings=settings, model=model)


def schedules(depth: int = 3):
    """All that fit, with the tokens each block sees."""
    for merges in product(range(5), repeat=depth - 1):
        seen = [TOKENS]
        for count in merges:
            if count > (seen[-1] - PREFIX) // 2:
                break
            seen.append(seen[-1] - count)
        else:
            yield merges, seen


def lost(found: Ranking, merges) -> float:
    """What a schedule loses, interpolated by hand."""
    total = 0.0
    for one, losses, count in zip(found.token_sites, merge_losses(found, 1.0), merges, strict=True):
        xs, ys = [0, *one.counts], [0.0, *losses]
        for i in range(1, len(xs)):
            ys[i] = max(ys[i], ys[i - 1])
        right = next(i for i, x in enumerate(xs) if x >= count)
        if count:
            share = (count - xs[right - 1]) / (xs[right] - xs[right - 1])
            total += ys[right - 1] + share * (ys[right] - ys[right - 1])
    return total


def brute(found: Ranking, flops: float, weights: bool = True, tokens: bool = True) -> float:
    """The best score kept less losses, over all schedules and sizes within the budget."""
    scores = [np.cumsum([0.0, *np.sort(site.score)[::-1]]) for site in found.sites]
    room, best = flops * found.dense_macs(TOKENS) * (1 + 1e-12), -np.inf
    for merges, seen in schedules():
        if not tokens and any(merges):
            continue
        loss = lost(found, merges)
        costs = [site.macs_per_unit(seen[site.block]) for site in found.sites]
        sizes = product(*(range(s.units + 1) if weights else [s.units] for s in found.sites))
        for counts in sizes:
            if sum(c * n for c, n in zip(costs, counts, strict=True)) <= room:
                best = max(best, sum(s[n] for s, n in zip(scores, counts, strict=True)) - loss)
    return best


def net(found: Ranking, mask) -> float:
    total = sum(float(site.score.sum()) for site in found.sites)
    kept = sum(float(site.score[mask.keep[site.name]].sum()) for site in found.sites)
    assert mask.objective["kept"] == pytest.approx(kept / total)
    loss = lost(found, (*mask.merges, 0, 0)[:2])
    assert mask.objective.get("merging", 0.0) == pytest.approx(loss / total)
    return kept - loss


@examples(12, shrink=False)
@given(st.integers(0, 1000), st.sampled_from([0.4, 0.6, 0.8]), st.sampled_from([0.05, 0.3, 1.0]))
def test_joint_is_as_good_as_brute_force_within_its_gap(seed, flops, dear):
    found = ranking(seed, dear, heads=2, neurons=2)
    mask = select(found, Request(flops=flops, merge="joint"))
    best = brute(found, flops)
    total = sum(float(site.score.sum()) for site in found.sites)
    reached = net(found, mask)
    assert mask.reached["flops"] <= flops + 1e-12
    assert reached <= best + 1e-9
    assert best <= mask.objective["bound"] * total + 1e-9
    assert best - reached <= mask.objective["gap"] * total + 1e-9
    assert best - reached <= 0.05 * total
    assert reached >= brute(found, flops, tokens=False) - 1e-9
    assert reached >= brute(found, flops, weights=False) - 0.05 * total


@examples(40)
@given(st.integers(0, 1000), st.sampled_from([0.5, 0.7, 0.85]), st.sampled_from([0.01, 0.3, 3.0]))
def test_joint_is_never_worse_than_weights_or_tokens_alone(seed, flops, dear):
    found = ranking(seed, dear)
    nets = {}
    for merge in ("none", "only", "joint"):
        try:
            nets[merge] = net(found, select(found, Request(flops=flops, merge=merge)))
        except BudgetError:
            assert merge == "only"
    assert nets["joint"] >= max(nets.values()) - 1e-9


def test_only_merges_keep_every_unit_and_come_close_to_brute_force():
    for seed in range(30):
        found = ranking(seed, 0.3, heads=2, neurons=2)
        mask = select(found, Request(flops=0.8, merge="only"))
        assert all(len(mask.keep[site.name]) == site.units for site in found.sites)
        assert mask.reached["flops"] <= 0.8 and mask.budget["merge"] == "only"
        best = brute(found, 0.8, weights=False)
        assert best - 0.1 * abs(best) <= net(found, mask) <= best + 1e-9


def test_a_budget_that_tokens_alone_can_not_reach_names_the_smallest_that_they_can():
    found = ranking(3)
    with pytest.raises(BudgetError) as caught:
        select(found, Request(flops=0.05, merge="only"))
    least = min(
        sum(site.units * site.macs_per_unit(seen[site.block]) for site in found.sites)
        for _, seen in schedules()
    )
    told = float(caught.value.hint.split("flops=")[1].split(";")[0])
    assert told == pytest.approx(least / found.dense_macs(TOKENS), abs=1e-4)
    assert "tokens='joint'" in caught.value.hint
    assert select(found, Request(flops=told, merge="only")).reached["flops"] <= told


def test_what_is_reached_counts_the_tokens_each_block_sees():
    found = ranking(3, 0.01)
    mask = select(found, Request(flops=0.5, merge="joint"))
    seen = tokens_by_block(TOKENS, 3, mask.merges, PREFIX)
    macs = sum(len(mask.keep[s.name]) * s.macs_per_unit(seen[s.block]) for s in found.sites)
    assert any(mask.merges)
    assert mask.reached["macs"] == macs and mask.reached["dense_macs"] == found.dense_macs(TOKENS)


def test_tokens_are_left_alone_where_merging_costs_too_much():
    found = ranking(0, 1e6)
    assert select(found, Request(flops=0.6, merge="joint")).merges == []
    plain = select(found, Request(flops=0.6))
    assert select(found, Request(flops=0.6, merge="joint")).keep == plain.keep
    assert select(found, Request(flops=1.0, merge="joint")).merges == []


def test_losses_have_the_units_lambda_and_feature_weights():
    found = ranking(5)
    for weight, features in ((0.0, "sum"), (0.5, "root"), (2.0, "last")):
        problem = pose(
            found, Request(flops=0.5, merge="joint", output_weight=weight, feature_weights=features)
        )
        losses = boundaries_of(problem).losses
        unit, scores = found.sites[0], combine(found.sites, weight, features)[found.sites[0].name]
        like = dataclasses.replace(  # a boundary that loses exactly what a unit does scores the same
            found.token_sites[0], columns=unit.columns, trajectory=unit.trajectory[:3], output=unit.output[:3]
        )
        same = dataclasses.replace(found, token_sites=[like])
        np.testing.assert_allclose(merge_losses(same, weight, features)[0], scores[:3])
        assert all((np.diff(one) >= 0).all() and one[0] == 0 for one in losses)


def test_a_merged_model_keeps_its_schedule_and_budgets_count_with_it():
    found = ranking(1)
    merged = dataclasses.replace(found, model={**found.model, "merges": [3, 1]})
    mask = select(merged, 0.5)
    assert mask.merges == [3, 1]
    assert len(mask.keep["blocks.2.neurons"]) >= len(select(found, 0.5).keep["blocks.2.neurons"])
    assert mask.objective["kept"] > select(found, 0.5).objective["kept"]
    assert select(merged, Request(flops=1.0, relative_to="current")).reached["flops"] == pytest.approx(1.0)
    assert (
        net(merged, select(merged, Request(flops=0.5, merge="joint")))
        >= net(merged, mask_without(mask)) - 1e-9
    )


def mask_without(mask):
    return dataclasses.replace(
        mask, objective={**mask.objective, "merging": lost(ranking(1), mask.merges) / total_of(1)}
    )


def total_of(seed: int) -> float:
    return sum(float(site.score.sum()) for site in ranking(seed).sites)


def test_guards_hold_and_merging_reaches_budgets_that_they_forbid():
    found = ranking(2)
    guarded = Request(flops=0.7, protect=("*",))
    with pytest.raises(BudgetError):
        select(found, guarded)
    mask = select(found, dataclasses.replace(guarded, merge="joint"))
    assert all(len(mask.keep[site.name]) == site.units for site in found.sites)
    with pytest.raises(BudgetError, match="flops="):
        select(found, dataclasses.replace(guarded, merge="joint", flops=0.1))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(flops=0.5, merge="both"), "joint"),
        (Request(params=0.9, merge="joint"), "no budget of MACs"),
    ],
)
def test_requests_that_make_no_sense_are_refused(request_, message):
    with pytest.raises(UsageError, match=message):
        select(ranking(), request_)


def test_a_ranking_without_losses_says_how_to_get_them():
    with pytest.raises(UsageError, match="what merging tokens costs"):
        select(tiny_ranking(), Request(flops=0.5, merge="joint"))
