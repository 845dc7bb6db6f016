"""The solver against brute force over all masks."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st

from optin_cli.selection.solver import solve


@st.composite
def instances(draw, max_classes: int, max_units: int = 11):
    """(scores, costs, budget, forced) small enough to enumerate."""
    prices = draw(st.lists(st.integers(1, 9), min_size=1, max_size=max_classes, unique=True))
    units = draw(st.integers(1, max_units))
    costs = np.array(draw(st.lists(st.sampled_from(prices), min_size=units, max_size=units)), dtype=float)
    scores = np.array(draw(st.lists(st.integers(0, 50), min_size=units, max_size=units)), dtype=float)
    forced = np.array(draw(st.lists(st.booleans(), min_size=units, max_size=units))) & draw(st.booleans())
    budget = draw(st.floats(0, 1)) * costs.sum()
    return scores, costs, budget, forced


def best_by_enumeration(scores, costs, budget, forced):
    best = None
    for mask in product([False, True], repeat=len(scores)):
        mask = np.array(mask)
        if (mask | ~forced).all() and costs[mask].sum() <= budget * (1 + 1e-9):
            value = scores[mask].sum()
            best = value if best is None else max(best, value)
    return best


def check_valid(solution, scores, costs, budget, forced):
    assert costs[solution.keep].sum() <= budget * (1 + 1e-9)
    assert solution.keep[forced].all()
    assert solution.score == pytest.approx(scores[solution.keep].sum())
    assert solution.cost == pytest.approx(costs[solution.keep].sum())


@examples(300)
@given(instances(max_classes=2))
def test_two_costs_are_solved_exactly(instance):
    scores, costs, budget, forced = instance
    best = best_by_enumeration(*instance)
    solution = solve(scores, costs, budget, forced)
    if best is None:
        assert solution is None
        return
    check_valid(solution, *instance)
    assert solution.score == pytest.approx(best)
    assert solution.bound >= best - 1e-6


@examples(200)
@given(instances(max_classes=4, max_units=10))
def test_more_costs_stay_within_the_reported_gap(instance):
    best = best_by_enumeration(*instance)
    solution = solve(*instance)
    if best is None:
        assert solution is None
        return
    check_valid(solution, *instance)
    assert solution.score <= best + 1e-6
    assert solution.score >= best - solution.gap - 1e-6
    assert solution.bound >= best - 1e-6


@examples(60)
@given(instances(max_classes=2), st.floats(0, 1))
def test_a_larger_budget_never_scores_less(instance, share):
    scores, costs, budget, forced = instance
    small, large = solve(scores, costs, budget * share, forced), solve(scores, costs, budget, forced)
    if small is not None:
        assert large.score >= small.score - 1e-9


def test_all_units_fit_at_the_full_budget():
    costs = np.array([3.0, 3, 1, 1, 1])
    solution = solve(np.ones(5), costs, costs.sum(), np.zeros(5, bool))
    assert solution.keep.all()
    assert solution.gap == pytest.approx(0)


def test_ties_go_to_the_lower_index():
    solution = solve(np.ones(6), np.ones(6), 3.0, np.zeros(6, bool))
    assert solution.keep.tolist() == [True] * 3 + [False] * 3


def test_a_model_of_bert_base_size_is_within_one_head_of_the_bound():
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.lognormal(4, 1, 144), rng.lognormal(0, 1, 36_864)])
    costs = np.concatenate([np.full(144, 64.0), np.full(36_864, 1.0)])
    for share in (0.02, 0.3, 0.6, 0.9):
        solution = solve(scores, costs, share * costs.sum(), np.zeros(len(costs), bool))
        assert solution.cost <= share * costs.sum()
        assert solution.gap < 1e-3 * solution.bound
