"""The interval of a speed-up, the knee of batch sizes, and the table for other tools."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from helpers.cli import run
from helpers.models import saved_model, shared_model

from optin_cli.errors import UsageError
from optin_cli.measure import latency
from optin_cli.measure.comparison import CSV_COLUMNS
from optin_cli.measure.latency import Setting, Timing, bench_to_knee, speedup, speedup_interval


def timing(times, batch=4) -> Timing:
    median = float(np.median(times)) if len(times) else 0.0
    return Timing(
        model="m", setting=Setting(batch, 8), median_ms=median, p10_ms=median, p90_ms=median, rounds=len(times),
        throughput=1.0, peak_memory=0, macs=1, params=1, device="cpu", threads=1, dtype="float32", doubling=2.0,
        saturated=True, times=tuple(times),
    )  # fmt: skip


def test_what_slows_both_models_down_leaves_no_doubt():
    drift = np.random.default_rng(0).uniform(1, 5, 21)
    low, high = speedup_interval(timing(2 * drift), timing(drift))
    assert (low, high) == (pytest.approx(2.0), pytest.approx(2.0))


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    rng, hits, trials = np.random.default_rng(1), 0, 100
    for trial in range(trials):
        dense, pruned = 3 * rng.lognormal(0, 0.2, 31), 2 * rng.lognormal(0, 0.2, 31)
        low, high = speedup_interval(timing(dense), timing(pruned), seed=trial)
        assert low <= speedup(timing(dense), timing(pruned)) <= high
        hits += low <= 1.5 <= high
    assert 0.88 <= hits / trials <= 1


def test_more_rounds_leave_less_doubt():
    rng = np.random.default_rng(2)
    widths = []
    for rounds in (10, 400):
        low, high = speedup_interval(
            timing(rng.lognormal(0, 0.3, rounds)), timing(rng.lognormal(0, 0.3, rounds))
        )
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_timings_of_other_rounds_have_no_interval():
    for other in (timing([1.0, 2.0]), timing([1.0] * 3, batch=8), timing([])):
        with pytest.raises(ValueError, match="different rounds"):
            speedup_interval(timing([1.0] * 3), other)


# ---- the knee ----


def slow_start(monkeypatch, overhead):
    """A forward takes `overhead` milliseconds and one more for each example."""
    monkeypatch.setattr(
        latency, "_forward_ms", lambda model, inputs: overhead + len(next(iter(inputs.values())))
    )


@pytest.mark.parametrize(("overhead", "knee", "last"), [(0.3, 4, 8), (1, 16, 32)])
def test_the_search_ends_where_more_examples_gain_little(monkeypatch, overhead, knee, last):
    slow_start(monkeypatch, overhead)
    model = shared_model("bert")
    timings = bench_to_knee([model, model], [4], repeats=1, seconds=0.0, warmup=0)
    batches = [timing.setting.batch_size for timing in timings[::2]]
    assert batches == [2**power for power in range(len(batches))] and batches[-1] == last
    named = {timing.point: timing.setting.batch_size for timing in timings if timing.point}
    assert named == {"single stream": 1, "offline": knee}
    best = max(timing.throughput for timing in timings)
    at = {timing.setting.batch_size: timing.throughput for timing in timings}
    assert at[knee] * 1.05 >= best > at[knee // 2] * 1.05


def test_a_device_that_one_example_fills(monkeypatch):
    slow_start(monkeypatch, 0)
    timings = bench_to_knee([shared_model("bert")], [4], repeats=1, seconds=0.0, warmup=0)
    assert [(t.setting.batch_size, t.point) for t in timings] == [(1, "single stream and offline"), (2, "")]


def test_the_largest_batch_that_fits_ends_the_search(monkeypatch):
    slow_start(monkeypatch, 100)
    whole = latency.bench

    def small_memory(models, batch_sizes, *args, **options):
        if batch_sizes[0] > 4:
            raise UsageError("a batch of 8 does not fit") from latency.torch.OutOfMemoryError()
        return whole(models, batch_sizes, *args, **options)

    monkeypatch.setattr(latency, "bench", small_memory)
    timings = bench_to_knee([shared_model("bert")], [4], repeats=1, seconds=0.0, warmup=0)
    assert [(t.setting.batch_size, t.point) for t in timings] == [
        (1, "single stream"),
        (2, ""),
        (4, "offline"),
    ]


def test_errors_other_than_memory_are_told(monkeypatch):
    with pytest.raises(UsageError, match="at least 1"):
        bench_to_knee([shared_model("bert")], [0], repeats=1, seconds=0.0)


def test_the_command_names_the_points_and_writes_the_table(monkeypatch, tmp_path):
    slow_start(monkeypatch, 1)
    model = saved_model("bert")
    command = ["bench", model, "--baseline", model, "--batch-size", "knee", "--seq-len", 4, "--repeats", 3]
    done = run(*command, "--seconds", 0, "--csv", tmp_path / "t.csv", "--json")
    rows = json.loads(done.stdout)["timings"]
    assert {row["setting"]["batch_size"] for row in rows if row["point"] == "offline"} == {16}
    assert all("times" not in row for row in rows)
    table = list(csv.DictReader((tmp_path / "t.csv").open()))
    assert tuple(table[0])[: len(CSV_COLUMNS)] == CSV_COLUMNS
    for row, written in zip(rows, table, strict=True):
        assert float(written["infer_step_time"]) == pytest.approx(row["median_ms"], abs=1e-3)
        assert float(written["infer_samples_per_sec"]) == pytest.approx(row["throughput"], abs=1e-2)
        assert float(written["infer_gmacs"]) == pytest.approx(row["macs"] / 1e9, abs=1e-4)
        assert (written["infer_seq_len"], written["infer_img_size"]) == ("4", "")
    pruned = [row for row in rows if "speedup" in row]
    assert pruned and all(
        low <= row["speedup"] <= high for row in pruned for low, high in [row["speedup_interval"]]
    )
    assert "offline: batch 16" in run(*command, "--seconds", 0).stderr


def test_a_vision_model_has_the_size_of_its_images_in_the_table(tmp_path):
    run(
        "bench",
        saved_model("vit"),
        "--batch-size",
        1,
        "--repeats",
        1,
        "--seconds",
        0,
        "--csv",
        tmp_path / "t.csv",
    )
    (row,) = csv.DictReader((tmp_path / "t.csv").open())
    assert row["infer_img_size"] and not row["infer_seq_len"] and not row["speedup"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--table", "t.json", "--batch-size", "knee"], "one batch size"),
        (["--table", "t.json", "--csv", "t.csv"], "one batch size"),
        (["--new-tokens", 4, "--batch-size", "knee"], "leave --compile"),
        (["--new-tokens", 4, "--seq-len", "4,8"], "one number"),
        (["--new-tokens", 4], "writes no text"),
        (["--batch-size", "elbow"], "write --batch-size 1,32"),
    ],
)
def test_settings_that_can_not_go_together(options, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in run("bench", saved_model("bert"), *options, code=2).stderr
    assert not list(tmp_path.iterdir())
