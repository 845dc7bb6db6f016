"""What the batches of a ranking say of its scores: against direct computation and planted noise."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from helpers.artefacts import tiny_ranking
from helpers.lazy import Lazy
from helpers.runs import examples
from hypothesis import given
from hypothesis import strategies as st

from optin_cli.importance import combine
from optin_cli.selection.stability import examples_needed, spearman, spearman_brown, stability

stats = Lazy("scipy.stats")


def noisy(batches: int, noise: float, seed: int = 0, drift: float = 0.0, neurons: int = 400, weights=None):
    """A ranking of `batches` batches: a truth of deviation 1 around 6, noise, and a `drift` along the batches."""
    ranking = tiny_ranking(blocks=2, heads=30, neurons=neurons, seed=seed)
    rng = np.random.default_rng(seed + 1)
    weights = np.full(batches, 1 / batches) if weights is None else np.array(weights)
    for site in ranking.sites:
        truth = 6 + np.random.default_rng([7, site.block]).normal(size=(site.units, 2))
        slope = np.random.default_rng([8, site.block]).normal(
            0, drift, (site.units, 2)
        )  # longer texts need other units
        along = np.linspace(-1, 1, batches)[:, None, None]
        each = truth + noise * rng.normal(size=(batches, site.units, 2)) + slope * along
        site.by_batch = each.astype(np.float32)
        site.output = np.tensordot(weights, site.by_batch[..., 1].astype(float), 1)
        site.trajectory = np.zeros((site.units, len(site.columns)))
        site.trajectory[:, 0] = np.tensordot(weights, site.by_batch[..., 0].astype(float), 1)
    ranking = replace(ranking, batch_weights=weights.tolist(), row_ids=list(range(32 * batches)))
    for site in ranking.sites:
        site.score = combine(ranking.sites, 1.0)[site.name]
    return ranking


def scores(ranking, kind: str | None = None) -> np.ndarray:
    return np.concatenate([s.score for s in ranking.sites if kind in (None, s.kind)])


@examples(50)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=30), st.integers(0, 99))
def test_spearman_is_scipys_with_ties(values, seed):
    one = np.array(values, dtype=float)
    other = np.random.default_rng(seed).integers(0, 4, len(one)).astype(float)
    found = spearman(one, other)
    if len(set(one)) == 1 or len(set(other)) == 1:
        assert found == 0
    else:
        assert found == pytest.approx(stats.spearmanr(one, other).statistic)


def test_four_batches_have_two_splits_and_both_are_counted():
    """By hand: batches 0, 1 and 2, 3 are neighbours; {0, 2} against {1, 3} and {0, 3} against {1, 2}."""
    ranking = noisy(4, 1.0, weights=[0.3, 0.3, 0.3, 0.1])
    found = stability(ranking, splits=400)
    mixture = combine(ranking.sites, 1.0)
    scale = (scores(ranking) - np.concatenate([s.trajectory.sum(1) for s in ranking.sites])) / np.concatenate(
        [s.output for s in ranking.sites]
    )
    assert np.concatenate(list(mixture.values())) == pytest.approx(scores(ranking))
    each = np.concatenate([s.by_batch[..., 0] for s in ranking.sites], 1) + scale * np.concatenate(
        [s.by_batch[..., 1] for s in ranking.sites], 1
    )
    weights = np.array(ranking.batch_weights)

    def half(*members):
        m = list(members)
        return weights[m] @ each[m] / weights[m].sum()

    splits = [(half(0, 2), half(1, 3)), (half(0, 3), half(1, 2))]
    expected = np.mean([stats.spearmanr(a, b).statistic for a, b in splits])
    assert found.agreement["all"].halves == pytest.approx(expected, abs=2e-3)
    errors = np.sqrt(np.mean([((a - b) / 2) ** 2 for a, b in splits], axis=0))
    assert found.agreement["all"].error == pytest.approx(np.median(errors / scores(ranking)), rel=0.05)
    interval = found.near[0.6][0]
    units = [(s.name, u) for s in ranking.sites for u in range(s.units)]
    error = errors[units.index((interval.site, interval.unit))]
    assert interval.high - interval.score == pytest.approx(2 * error, rel=0.15)


@pytest.mark.parametrize("noise", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("batches", [8, 15])
def test_the_extrapolation_is_what_another_draw_shows(noise, batches):
    """Spearman-Brown and the standard errors against rankings of other, independent batches."""
    found = stability(noisy(batches, noise))
    others = [noisy(batches, noise, seed) for seed in range(10, 16)]
    truth = np.mean([stats.spearmanr(scores(a), scores(b)).statistic for a, b in pairwise(others)])
    assert found.agreement["all"].full == pytest.approx(truth, abs=0.02)
    spread = np.std([scores(r) for r in others], axis=0, ddof=1) / np.mean(
        [scores(r) for r in others], axis=0
    )
    assert found.agreement["all"].error == pytest.approx(np.median(spread), rel=0.2)
    assert found.agreement["all"].halves < found.agreement["all"].full


def test_the_samples_it_asks_for_are_enough_and_not_too_many():
    few = noisy(6, 2.0)
    found = stability(few, target=0.95)
    assert found.low and found.needed > found.examples == 6 * 32
    batches = round(found.needed / 32)
    more = [noisy(batches, 2.0, seed) for seed in (21, 22)]
    assert stats.spearmanr(scores(more[0]), scores(more[1])).statistic == pytest.approx(0.95, abs=0.015)


def test_kinds_are_told_apart():
    ranking = noisy(8, 0.2)
    for site in ranking.sites:
        if site.kind == "heads":
            extra = np.random.default_rng(site.block).normal(size=site.by_batch.shape)
            extra -= extra.mean(0)
            site.by_batch = (site.by_batch * (1 + 2 * extra)).astype(np.float32)
            site.output, site.trajectory[:, 0] = site.by_batch[..., 1].mean(0), site.by_batch[..., 0].mean(0)
    for site in ranking.sites:
        site.score = combine(ranking.sites, 1.0)[site.name]
    found = stability(ranking)
    assert found.agreement["heads"].halves < 0.9 < found.agreement["neurons"].halves
    assert found.agreement["heads"].error > 5 * found.agreement["neurons"].error
    assert found.needed == found.agreement["heads"].needed


def test_text_length_is_not_taken_for_noise():
    """Units that matter more in longer texts drift along the sorted batches: any fair half has all lengths."""
    steady, drifting = stability(noisy(16, 0.1)), stability(noisy(16, 0.1, drift=2.0))
    assert drifting.agreement["all"].halves > steady.agreement["all"].halves - 0.02
    each = np.concatenate([s.by_batch[..., 1] for s in noisy(16, 0.1, drift=2.0).sites], 1)
    plain = stats.spearmanr(each[:8].mean(0), each[8:].mean(0)).statistic
    assert plain < drifting.agreement["all"].halves - 0.1


def test_more_is_undecided_where_there_is_more_noise_and_the_cut_is_where_the_budget_says():
    quiet, loud = stability(noisy(8, 0.1)), stability(noisy(8, 2.0))
    for budget in (0.8, 0.6, 0.4):
        assert 5 * quiet.agreement["all"].undecided[budget] < loud.agreement["all"].undecided[budget]
    ranking = noisy(8, 0.02)
    near = stability(ranking, nearest=30).near[0.6]
    assert all(n.low <= n.score <= n.high for n in near)
    cost = {s.name: s.macs_per_unit(ranking.tokens) for s in ranking.sites}
    price = near[0].cut / cost[near[0].site]
    kept = sum(cost[s.name] * (s.score / cost[s.name] >= price).sum() for s in ranking.sites)
    assert kept == pytest.approx(0.6 * ranking.macs(ranking.tokens), rel=0.02)


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_one_or_two_batches_can_not_tell(batches):
    ranking = noisy(max(batches, 1), 0.1)
    assert stability(replace(ranking, batch_weights=ranking.batch_weights[:batches])) is None
    assert stability(noisy(3, 0.1)) is not None


def test_scores_that_are_no_mean_over_batches_can_not_be_told_either():
    ranking = noisy(8, 0.1)
    ranking.sites[0].score = np.random.default_rng(0).random(ranking.sites[0].units)
    assert stability(ranking) is None
    for site in ranking.sites:
        site.by_batch = site.by_batch[:0]
    assert stability(ranking) is None


def test_scores_of_output_alone_are_told():
    """Fisher has no trajectory; K-prune multiplies the heads."""
    ranking = noisy(8, 0.3)
    for site in ranking.sites:
        site.columns, site.trajectory = [], np.zeros((site.units, 0))
        site.by_batch[..., 0] = 0
        site.score = (64 if site.kind == "heads" else 1) * site.output
    found = stability(ranking)
    assert 0.9 < found.agreement["neurons"].full < 1


@examples(40)
@given(st.floats(0.05, 0.99), st.floats(0.5, 0.99), st.integers(10, 2000))
def test_the_samples_needed_reach_the_target_and_one_fewer_does_not(agreement, target, samples):
    needed = examples_needed(samples, agreement, target)
    assert spearman_brown(agreement, needed / samples) >= target - 1e-9
    assert spearman_brown(agreement, (needed - 1) / samples) <= target + 1e-9


def test_no_agreement_can_not_be_extrapolated():
    assert spearman_brown(-0.2, 2) == 0
    assert examples_needed(100, 0.0, 0.95) is None
    assert examples_needed(100, 1.0, 0.95) == 1


def test_the_same_ranking_gives_the_same_numbers():
    assert stability(noisy(9, 0.4)) == stability(noisy(9, 0.4))
