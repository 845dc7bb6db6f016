"""Bisection over budgets finds what trying all of them finds."""

from __future__ import annotations

import pytest
from helpers.runs import examples
from hypothesis import given
from hypothesis import strategies as st

from optin_cli.artefacts.point import Point, over_seeds
from optin_cli.errors import BudgetError, GateError, UsageError
from optin_cli.trials.pick import Promise, pick
from optin_cli.trials.search import STEP, search

GRID = [round(step * STEP, 10) for step in range(1, round(1 / STEP))]


def point(share, drop, speedup=1.0, name=None, seed=0):
    timing = {
        "batch_size": 8, "size": 4, "device": "cpu", "threads": 1, "dtype": "float32", "execution": "eager",
        "dense_ms": 10.0 * speedup, "ms": 10.0, "speedup": speedup, "interval": [speedup, speedup],
        "ideal_speedup": 1 / share, "throughput": 1.0, "dense_throughput": 1.0, "peak_memory": 1,
        "dense_peak_memory": 1,
    }  # fmt: skip
    return Point(
        name=name or f"flops-{share:g}", variant="", seed=seed, model={"id": "m", "digest": "d"}, ranking="r", mask="k",
        budget={"flops": share}, reached={"macs": share, "dense_macs": 1.0}, params=1,
        evaluation={"drop": drop, "main": "accuracy", "metrics": {"accuracy": 90 - (drop or 0)}}, timings=[timing],
    )  # fmt: skip


@examples(80)
@given(st.floats(0, 40), st.floats(0.3, 4), st.floats(0.0, 0.5))
def test_the_smallest_that_loses_no_more(most, power, smallest):
    def drop(share):
        return 50 * (1 - share) ** power

    tried = []

    def trial(share, number):
        assert number == len(tried) + 1
        if share < smallest:
            raise BudgetError("too small")
        tried.append(share)
        return point(share, drop(share))

    within = [share for share in GRID if share >= smallest and drop(share) <= most]
    if not within:
        with pytest.raises(GateError, match="nearest"):
            search(trial, Promise(max_drop=most), "here")
        return
    found = search(trial, Promise(max_drop=most), "here")
    assert found.best.share == min(within)
    assert len(tried) == len(set(tried)) <= 6
    assert [one.share for one in found.trials] == tried


@examples(60)
@given(st.floats(1.0, 12.0), st.floats(0.2, 1.0))
def test_the_largest_that_is_fast_enough(least, slope):
    def speedup(share):
        return 1 + slope * (1 / share - 1)

    fast = [share for share in GRID if speedup(share) >= least]
    promise = Promise(min_speedup=least)

    def trial(share, number):
        return point(share, 10 * (1 - share), speedup(share))

    if fast:
        assert search(trial, promise, "here").best.share == max(fast)
    else:
        with pytest.raises(GateError):
            search(trial, promise, "here")


def test_both_promises_must_hold():
    def trial(share, number):
        return point(share, 10 * (1 - share), 1 / share)

    assert search(trial, Promise(max_drop=5, min_speedup=2), "here").best.share == pytest.approx(0.5)
    with pytest.raises(GateError, match="min_speedup=3"):
        search(trial, Promise(max_drop=5, min_speedup=3), "here")


def test_budgets_that_no_mask_meets():
    def trial(share, number):
        raise BudgetError("the smallest is 0.99")

    with pytest.raises(BudgetError, match=r"0\.99"):
        search(trial, Promise(max_drop=1), "here")


# ---- pick ----


def test_of_those_that_keep_a_speed_the_one_that_loses_least():
    points = [point(0.8, 1, 1.2), point(0.6, 4, 1.6), point(0.4, 3, 2.2)]
    assert pick(points, Promise(min_speedup=1.5), "here").share == 0.4
    assert pick(points, Promise(max_latency=10), "here").share == 0.8
    assert pick(points, Promise(max_drop=3.5), "here").share == 0.4
    assert pick(points, Promise(max_drop=3.5, min_speedup=1.1), "here").share == 0.4


def test_what_was_not_measured_is_left_out_unless_nothing_was():
    unknown = point(0.2, None, 5)
    assert pick([unknown, point(0.5, 1)], Promise(max_drop=2), "here").share == 0.5
    with pytest.raises(UsageError, match="no measured drop"):
        pick([unknown], Promise(max_drop=2), "here")
    assert pick([unknown], Promise(min_speedup=2), "here") is unknown


def test_seeds_are_grouped_by_budget():
    points = [point(0.5, 2.0), point(0.5, 4.0, name="flops-0.5-seed1", seed=1), point(0.9, 1.0)]
    (half, most) = over_seeds(points)
    assert (half.name, half.seeds, half.drop) == ("flops-0.5", 2, 3.0)
    assert half.deviation == pytest.approx(2**0.5)
    assert (most.seeds, most.deviation) == (1, 0.0)
