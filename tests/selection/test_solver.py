"""The solver against enumeration of all choices, and its bound against a linear program."""

from __future__ import annotations

from functools import partial
from itertools import product

import numpy as np
import pytest
from helpers.lazy import Lazy
from helpers.runs import examples
from hypothesis import given
from hypothesis import strategies as st

from optin_cli.selection import solver
from optin_cli.selection.choices import Sizes, classes_of
from optin_cli.selection.relaxation import relax
from optin_cli.selection.search import search
from optin_cli.selection.solver import solve

optimize = Lazy("scipy.optimize")


def straight(scores, unit, low: int = 0, multiple: int = 1) -> Sizes:
    """A site whose units all cost `unit`, [budgets]."""
    best = np.sort(np.asarray(scores, dtype=float))[::-1]
    counts = np.arange(low, len(best) + 1, multiple)
    unit = np.asarray(unit, dtype=float)
    step = tuple((unit * multiple).tolist()) if len(counts) > 1 else None
    return Sizes(counts, np.append(0, np.cumsum(best))[counts], unit[:, None] * counts, step)


def curved(scores, costs) -> Sizes:
    """A site with any rising costs, [budgets, units + 1]."""
    best = np.sort(np.asarray(scores, dtype=float))[::-1]
    counts = np.arange(len(best) + 1)
    return Sizes(counts, np.append(0, np.cumsum(best)), np.asarray(costs, dtype=float))


@st.composite
def uniform(draw, costs: int = 4, budgets: int = 3):
    """(site_sizes, budgets): sites that share up to `costs` unit costs, small enough to enumerate."""
    rows = draw(st.integers(1, budgets))
    units = draw(st.lists(st.tuples(*[st.integers(1, 9)] * rows), min_size=1, max_size=costs, unique=True))
    site_sizes = []
    for _ in range(draw(st.integers(1, 5))):
        scores = draw(st.lists(st.integers(0, 50), min_size=0, max_size=4))
        low = draw(st.integers(0, len(scores))) if draw(st.booleans()) else 0
        site_sizes.append(straight(scores, draw(st.sampled_from(units)), low))
    return site_sizes, _some(draw, site_sizes)


@st.composite
def stairs(draw, budgets: int = 2):
    """(site_sizes, budgets): every site has costs of its own, flat in places and steep in others."""
    rows = draw(st.integers(1, budgets))
    site_sizes = []
    for _ in range(draw(st.integers(1, 4))):
        scores = draw(st.lists(st.integers(0, 50), min_size=0, max_size=4))
        rises = [
            draw(st.lists(st.integers(0, 9), min_size=len(scores), max_size=len(scores))) for _ in range(rows)
        ]
        site_sizes.append(curved(scores, [np.append(0, np.cumsum(row)) for row in rises]))
    return site_sizes, _some(draw, site_sizes)


def _some(draw, site_sizes):
    most = np.sum([sizes.costs[:, -1] for sizes in site_sizes], axis=0)
    return np.array([draw(st.floats(0, 1.1)) for _ in most]) * most


instances = st.one_of(uniform(), stairs())


def by_enumeration(site_sizes, budgets) -> float | None:
    best = None
    for heights in product(*(range(len(sizes.counts)) for sizes in site_sizes)):
        pairs = list(zip(site_sizes, heights, strict=True))
        if (np.sum([sizes.costs[:, h] for sizes, h in pairs], axis=0) <= budgets * (1 + 1e-12)).all():
            score = sum(sizes.gains[h] for sizes, h in pairs)
            best = score if best is None else max(best, score)
    return best


def check_valid(solution, site_sizes, budgets):
    heights = [sizes.counts.tolist().index(n) for sizes, n in zip(site_sizes, solution.counts, strict=True)]
    pairs = list(zip(site_sizes, heights, strict=True))
    assert solution.costs == pytest.approx(np.sum([sizes.costs[:, h] for sizes, h in pairs], axis=0))
    assert solution.score == pytest.approx(sum(sizes.gains[h] for sizes, h in pairs))
    assert (solution.costs <= budgets * (1 + 1e-9)).all()


@examples(500)
@given(instances)
def test_the_solver_finds_what_enumeration_finds(instance):
    best, solution = by_enumeration(*instance), solve(*instance)
    if best is None:
        assert solution is None
        return
    check_valid(solution, *instance)
    assert solution.score == pytest.approx(best)
    assert solution.optimal
    assert solution.bound >= best - 1e-9


@examples(200)
@given(instances)
def test_a_search_cut_short_still_keeps_the_budgets_and_an_honest_gap(instance):
    best = by_enumeration(*instance)
    if best is None:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solver, "search", partial(search, most_states=1))
        solution = solve(*instance)
    check_valid(solution, *instance)
    assert best - solution.gap - 1e-9 <= solution.score <= best + 1e-9
    assert solution.bound >= best - 1e-9
    if solution.optimal:
        assert solution.score == pytest.approx(best)


def test_a_search_cut_short_says_so():
    rng = np.random.default_rng(1)
    site_sizes = [straight(rng.random(40), [rng.uniform(1, 2), rng.uniform(1, 2)]) for _ in range(8)]
    budgets = 0.5 * np.sum([sizes.costs[:, -1] for sizes in site_sizes], axis=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solver, "search", partial(search, most_states=1))
        solution = solve(site_sizes, budgets)
    assert not solution.optimal
    check_valid(solution, site_sizes, budgets)


@examples(300)
@given(instances, st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_a_larger_budget_never_scores_less(instance, shares):
    site_sizes, budgets = instance
    small, large = solve(site_sizes, budgets * shares[: len(budgets)]), solve(site_sizes, budgets)
    if small is not None:
        assert large.score >= small.score - 1e-9


def test_many_budgets_of_a_middling_model_rise_and_are_proved():
    """What enumeration can't reach: 24 sites with stairs of their own, 60 budgets one after the other."""
    rng = np.random.default_rng(0)
    site_sizes = [
        curved(rng.lognormal(0, 1, n), [np.append(0, np.cumsum(rng.random(n) * (np.arange(n) % 8 == 0)))])
        for n in [12, 256] * 12
    ]
    most = sum(sizes.costs[:, -1] for sizes in site_sizes)
    solutions = [solve(site_sizes, share * most) for share in np.linspace(0.05, 1, 60)]
    assert all(solution.optimal for solution in solutions)
    assert (np.diff([solution.score for solution in solutions]) >= 0).all()


@examples(150)
@given(instances)
def test_the_bound_is_the_linear_programs(instance):
    """The relaxation mixes the sizes of each site: one weight a size."""
    site_sizes, budgets = instance
    if by_enumeration(site_sizes, budgets) is None:
        return
    lengths = [len(sizes.counts) for sizes in site_sizes]
    program = optimize.linprog(
        -np.concatenate([sizes.gains for sizes in site_sizes]),
        A_ub=np.concatenate([sizes.costs for sizes in site_sizes], axis=1),
        b_ub=budgets * (1 + 1e-12),
        A_eq=np.repeat(np.eye(len(site_sizes)), lengths, axis=1),
        b_eq=np.ones(len(site_sizes)),
    )
    assert solve(site_sizes, budgets).bound == pytest.approx(-program.fun, rel=1e-7, abs=1e-7)


@examples(100)
@given(uniform())
def test_any_prices_the_relaxation_ends_with_bound_every_choice(instance):
    site_sizes, budgets = instance
    best = by_enumeration(site_sizes, budgets)
    if best is not None:
        found = relax(classes_of(site_sizes), budgets)
        assert found.bound >= best - 1e-9
        assert (found.prices >= 0).all()


def test_everything_fits_at_the_full_budget():
    site_sizes = [straight([1, 1], [3.0]), straight([1, 1, 1], [1.0])]
    solution = solve(site_sizes, np.array([9.0]))
    assert solution.counts == [2, 3]
    assert solution.gap == 0
    assert solution.optimal


def test_ties_go_to_the_earlier_site():
    assert solve([straight([1] * 3, [1.0]) for _ in range(3)], np.array([4.0])).counts == [3, 1, 0]


def test_sites_of_one_cost_are_one_class():
    site_sizes = [
        straight([3, 1], [1.0]),
        straight([5, 4], [2.0]),
        straight([2], [1.0]),
        curved([1], [[0, 1]]),
    ]
    classes = classes_of(site_sizes)
    assert [c.members for c in classes] == [(0, 2), (1,), (3,)]
    assert classes[0].gains.tolist() == [0, 3, 5, 6]
    assert [classes[0].sizes(n) for n in range(4)] == [[0, 0], [1, 0], [1, 1], [2, 1]]


@pytest.mark.parametrize("budgets", [1, 2])
@pytest.mark.parametrize("costs", [2, 4, 12])
def test_a_model_of_bert_base_size_is_within_a_hair_of_the_bound(costs, budgets):
    rng = np.random.default_rng(0)
    units = rng.uniform(1, 60, (costs, budgets))
    site_sizes = [
        straight(rng.lognormal(0, 1, 37_008 // 24) * units[i % costs, 0], units[i % costs]) for i in range(24)
    ]
    most = np.sum([sizes.costs[:, -1] for sizes in site_sizes], axis=0)
    for share in (0.02, 0.3, 0.9):
        solution = solve(site_sizes, share * most)
        check_valid(solution, site_sizes, share * most)
        assert solution.gap < 1e-4 * solution.bound
