"""Where charts put what they show."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.runs import examples
from hypothesis import given
from hypothesis import strategies as st

from optin_cli.reporting.charts import Series, Spot, axis, chart, log_range, profile, ranks


@examples(60)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8))
def test_an_axis_holds_its_values_and_a_few_round_ticks(values):
    made = axis(values, 50, 400)
    assert all(50 <= made.place(value) <= 400 for value in values)
    ticks = made.ticks()
    assert 1 <= len(ticks) <= 11
    assert [tick.at for tick in ticks] == sorted(tick.at for tick in ticks)
    assert all(50 <= tick.at <= 400.01 for tick in ticks)
    assert made.place(float(ticks[0].text)) == pytest.approx(ticks[0].at, abs=0.5)


def test_a_line_goes_through_the_means_of_seeds():
    spots = (Spot(90, 80, "a", "x"), Spot(90, 84, "b", "x"), Spot(50, 60, "c", "y"))
    made = chart("t", "x", "y", [Series("pruned", "main", spots)])
    (line,) = made.lines
    first, second = (tuple(map(float, pair.split(","))) for pair in line.path[1:].split(" L"))
    assert first[1] == pytest.approx((line.spots[0].y + line.spots[1].y) / 2, abs=0.1)
    assert second == pytest.approx((line.spots[2].x, line.spots[2].y), abs=0.1)
    assert line.spots[1].y < line.spots[0].y  # more is higher up
    assert line.spots[2].x < line.spots[0].x


def test_ranks_are_even_from_least_to_most():
    assert ranks(np.array([3.0, 1.0, 9.0])).tolist() == [0.5, 0.0, 1.0]
    assert ranks(np.array([2.0])).tolist() == [1.0]


def test_a_profile_falls_from_the_largest_score_to_the_smallest():
    scores = np.array([0.0, 0.01, 1.0, 0.1])
    low, high = log_range([scores])
    shape = profile(scores, low, high)
    ys = [float(pair.split(",")[1]) for pair in shape.split("L")[1].strip().split()[:1]]
    heights = [float(pair.split(",")[1]) for pair in shape.removeprefix("M0,40 L").split(" L")[:-1]]
    assert heights == sorted(heights) and ys and heights[0] == pytest.approx(2) and heights[-1] == 40
    assert len(profile(np.linspace(1, 2, 10_000), 0, 1)) < 2000
    assert profile(np.array([]), low, high) == ""
    assert log_range([np.zeros(3)]) == (-1.0, 0.0)
