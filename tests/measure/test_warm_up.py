"""Warming up ends when the times no longer change, or when its time is up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from optin_cli.measure import latency


def warm_up(monkeypatch, times, *, least=0, seconds=60.0):
    """Rounds that a model runs whose forwards take `times`, the last one from then on."""
    left = list(times)
    monkeypatch.setattr(latency, "_forward_ms", lambda *_: left.pop(0) if len(left) > 1 else left[0])
    return latency._warm_up([SimpleNamespace()], [{}], least, seconds)


def test_it_goes_on_while_forwards_become_faster(monkeypatch):
    falling = [100 * 0.8**step for step in range(12)]
    rounds = warm_up(monkeypatch, [*falling, falling[-1]])
    assert len(falling) + 3 <= rounds <= len(falling) + 5


def test_steady_times_end_it_at_once_but_not_before_the_least(monkeypatch):
    assert warm_up(monkeypatch, [10.0]) == 6
    assert warm_up(monkeypatch, [10.0], least=9) == 9


def test_noise_within_five_per_cent_is_steady(monkeypatch):
    assert warm_up(monkeypatch, [10, 10.4, 9.8, 10.2, 9.9, 10.1, 10.0]) == 6


def test_one_outlier_does_not_prolong_it(monkeypatch):
    assert warm_up(monkeypatch, [10, 10, 10, 50, 10, 10, 10]) == 6


def test_without_time_only_the_least_rounds_run(monkeypatch):
    assert warm_up(monkeypatch, [100, 50, 25, 12, 6], least=2, seconds=0.0) == 2


def test_all_models_must_be_steady(monkeypatch):
    slow = iter([100 * 0.7**step for step in range(10)] + [2.8] * 100)
    first, second = SimpleNamespace(), SimpleNamespace()
    monkeypatch.setattr(latency, "_forward_ms", lambda model, _: 5.0 if model is first else next(slow))
    assert latency._warm_up([first, second], [{}, {}], 0, 60.0) >= 13


@pytest.mark.parametrize("warmup", [0, 2])
def test_a_timing_says_how_many_rounds_it_took(monkeypatch, warmup):
    from helpers.models import shared_model

    monkeypatch.setattr(latency, "_forward_ms", lambda *_: 1.0)
    (timing,) = latency.bench([shared_model("bert")], [1], [8], repeats=2, seconds=0.0, warmup=warmup)
    assert timing.warmup == warmup
