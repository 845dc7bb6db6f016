"""Scoring end to end: what is recorded, reuse, resume, baselines."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.data import tiny_text_csv
from helpers.models import saved_model, shared_model

from optin_cli.artefacts.ranking import read_ranking, read_sketch
from optin_cli.data.sources import DataSpec
from optin_cli.errors import InputError, UsageError
from optin_cli.importance import combine, output_scale
from optin_cli.loading.checkpoint import open_model
from optin_cli.scoring import score as stage
from optin_cli.scoring.estimate import estimate_seconds
from optin_cli.scoring.methods.registry import configured
from optin_cli.scoring.plan import ScoreSettings, make_plan

SMALL = ScoreSettings(samples=12, batch_size=4, rows=24, probes=2)


def plan_for(folder, name="bert", settings=SMALL):
    csv = folder / "train.csv"
    if not csv.exists():
        tiny_text_csv(folder)
    return make_plan(shared_model(name), DataSpec(str(csv)), settings)


def same_scores(one, two) -> bool:
    return all(
        np.array_equal(getattr(a, part), getattr(b, part))
        for a, b in zip(one.sites, two.sites, strict=True)
        for part in ("score", "trajectory", "output")
    )


@pytest.mark.parametrize("method", ["curvature", "ablation", "mixed", "magnitude", "random"])
def test_every_method_scores_every_unit(method, tmp_path):
    plan = plan_for(tmp_path, settings=dataclasses.replace(SMALL, method=method))
    ranking = stage.score(plan, tmp_path / "r.h5")
    assert {s.name: s.units for s in ranking.sites} == {s.name: s.units for s in plan.model.anatomy}
    assert all((s.score > 0).all() for s in ranking.sites)
    assert read_ranking(tmp_path / "r.h5").digest == ranking.digest
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_columns_say_which_block_they_measure(tmp_path):
    ranking = stage.score(
        plan_for(tmp_path, settings=dataclasses.replace(SMALL, method="ablation")), tmp_path / "r.h5"
    )
    columns = {s.name: s.columns for s in ranking.sites}
    assert columns["blocks.0.heads"] == [1, 2]
    assert columns["blocks.1.neurons"] == [2]
    assert columns["blocks.2.heads"] == [2]  # the last block has no deeper feature
    assert all(s.trajectory.shape == (s.units, len(s.columns)) for s in ranking.sites)


def test_a_batch_alone_is_kept_and_the_batches_average_to_the_scores(tmp_path):
    ranking = stage.score(plan_for(tmp_path), tmp_path / "r.h5")
    weights = np.array(ranking.batch_weights)
    assert weights.sum() == pytest.approx(1)
    for site in read_ranking(tmp_path / "r.h5").sites:
        assert site.by_batch.shape == (3, site.units, 2)
        mean = np.tensordot(weights, site.by_batch, 1)
        np.testing.assert_allclose(mean[:, 0], site.trajectory.sum(1), rtol=1e-5)
        np.testing.assert_allclose(mean[:, 1], site.output, rtol=1e-5)


@pytest.mark.parametrize("probes", [1, 3])
def test_the_sketch_squares_to_the_scores(probes, tmp_path):
    settings = dataclasses.replace(SMALL, method="curvature", probes=probes, sketch_rows=30)
    ranking = stage.score(plan_for(tmp_path, settings=settings), tmp_path / "r.h5")
    sketch = read_sketch(tmp_path / "r.h5")
    kept = min(probes, 3)  # of 12 examples, 30 rows are three probes
    assert sorted(sketch.examples) == sorted(list(range(12)) * kept)
    for site in ranking.sites:
        squares = np.square(sketch.output[site.name]).sum(0)
        np.testing.assert_allclose(squares, site.output, rtol=0.02)  # float16
        assert sketch.trajectory[site.name].shape == (12 * kept, site.units)


def test_no_sketch_is_kept_unless_asked_for(tmp_path):
    plan = plan_for(tmp_path, settings=dataclasses.replace(SMALL, sketch_rows=0))
    stage.score(plan, tmp_path / "r.h5")
    assert read_sketch(tmp_path / "r.h5") is None


def test_a_sketch_larger_than_the_disk_is_refused_and_nothing_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(InputError, match=r"sketch_rows=0"):
        stage.score(plan_for(tmp_path), tmp_path / "r.h5")
    assert not (tmp_path / "r.h5").exists()
    monkeypatch.undo()
    stage.score(plan_for(tmp_path), tmp_path / "r.h5")
    assert read_ranking(tmp_path / "r.h5").sites


@pytest.mark.slow
def test_probing_goes_on_until_the_error_is_reached(tmp_path):
    counts, scatter = [], []
    exact = stage.score(
        plan_for(
            tmp_path, settings=dataclasses.replace(SMALL, method="curvature", probes=120, sketch_rows=0)
        ),
        tmp_path / "exact.h5",
    )
    for target in (0.4, 0.15):
        settings = dataclasses.replace(SMALL, method="curvature", rel_error=target, sketch_rows=0)
        found = stage.score(plan_for(tmp_path, settings=settings), tmp_path / f"{target}.h5")
        counts.append(found.settings["probed"])
        errors = [
            np.abs(a.trajectory.sum(1) / b.trajectory.sum(1) - 1)
            for a, b in zip(found.sites, exact.sites, strict=True)
        ]
        scatter.append(float(np.median(np.concatenate(errors))))
    assert 2 <= counts[0] < counts[1] / 4  # the error falls with the root
    assert scatter[0] < 0.4
    assert scatter[1] < 0.15


def test_the_band_is_scored_exactly_and_the_rest_by_probes(tmp_path):
    settings = dataclasses.replace(SMALL, exact_band=0.1, band_flops=0.5)
    found = stage.score(plan_for(tmp_path, settings=settings), tmp_path / "band.h5")
    exact = stage.score(
        plan_for(tmp_path, settings=dataclasses.replace(SMALL, method="ablation")), tmp_path / "a.h5"
    )
    probed = stage.score(plan_for(tmp_path), tmp_path / "p.h5")
    near = 0
    for a, b, c in zip(found.sites, exact.sites, probed.sites, strict=True):
        same = np.isclose(a.output, b.output, rtol=1e-4)
        np.testing.assert_array_equal(a.output[~same], c.output[~same])
        near += int(same.sum()) if a.kind == "neurons" else 0
    units = sum(s.units for s in found.sites)
    assert 0.1 * units < near <= 0.2 * units + 1


def test_score_is_trajectory_plus_scaled_output(tmp_path):
    ranking = stage.score(
        plan_for(tmp_path, settings=dataclasses.replace(SMALL, output_weight=0.5)), tmp_path / "r.h5"
    )
    scale = output_scale(ranking.sites, "fourth-root")
    for site in ranking.sites:
        trajectory = site.trajectory.sum(1) / site.trajectory.shape[1] ** 0.25
        np.testing.assert_allclose(site.score, trajectory + 0.5 * scale * site.output)
        np.testing.assert_array_equal(combine(ranking.sites, 0)[site.name], site.trajectory.sum(1))


def test_the_same_inputs_give_the_same_scores(tmp_path):
    one = stage.score(plan_for(tmp_path), tmp_path / "a.h5")
    two = stage.score(plan_for(tmp_path), tmp_path / "b.h5")
    assert same_scores(one, two)
    assert one.digest == two.digest
    other = stage.score(plan_for(tmp_path, settings=dataclasses.replace(SMALL, seed=1)), tmp_path / "c.h5")
    assert not same_scores(one, other)


def test_an_existing_ranking_is_recognised(tmp_path):
    plan = plan_for(tmp_path)
    assert stage.existing(tmp_path / "r.h5", plan) is None
    stage.score(plan, tmp_path / "r.h5")
    assert stage.existing(tmp_path / "r.h5", plan) is not None
    with pytest.raises(UsageError, match="probes"):
        stage.existing(tmp_path / "r.h5", plan_for(tmp_path, settings=dataclasses.replace(SMALL, probes=3)))
    with pytest.raises(UsageError, match="model"):
        stage.existing(tmp_path / "r.h5", plan_for(tmp_path, "electra"))
    lighter = plan_for(tmp_path, settings=dataclasses.replace(SMALL, output_weight=0.7))
    with pytest.raises(UsageError, match="select --lambda"):
        stage.existing(tmp_path / "r.h5", lighter)
    assert stage.existing(tmp_path / "r.h5", lighter, any_lambda=True) is not None


def test_changed_data_is_noticed(tmp_path):
    stage.score(plan_for(tmp_path), tmp_path / "r.h5")
    tiny_text_csv(tmp_path, seed=5)
    with pytest.raises(UsageError, match="other settings: data"):
        stage.existing(tmp_path / "r.h5", plan_for(tmp_path))


def test_an_interrupted_run_resumes_and_ends_bit_identical(tmp_path):
    ends_bit_identical(tmp_path)


def test_so_it_does_where_products_are_rounded(tmp_path, reduced_products):
    if not reduced_products:
        pytest.skip("needs a CPU with AMX: others round nothing")
    ends_bit_identical(tmp_path)


def ends_bit_identical(tmp_path):
    whole = stage.score(plan_for(tmp_path), tmp_path / "whole.h5")
    steps: list[float] = []

    def stop_in_the_middle(done, total, what):
        steps.append(done)
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage.score(plan_for(tmp_path), tmp_path / "r.h5", stop_in_the_middle)
    assert not (tmp_path / "r.h5").exists()
    finished = len(list((tmp_path / ".r.h5.partial").glob("*.npz")))
    assert finished > 0
    resumed = stage.score(plan_for(tmp_path), tmp_path / "r.h5")
    assert same_scores(whole, resumed)
    assert not (tmp_path / ".r.h5.partial").exists()


def test_other_settings_start_over(tmp_path, caplog):
    def stop(done, total, what):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage.score(plan_for(tmp_path), tmp_path / "r.h5", stop)
    changed = dataclasses.replace(SMALL, rows=20)
    with caplog.at_level("WARNING", logger="optin"):
        found = stage.score(plan_for(tmp_path, settings=changed), tmp_path / "r.h5")
    assert "starting over" in caplog.text
    assert "rows" in caplog.text
    assert same_scores(found, stage.score(plan_for(tmp_path, settings=changed), tmp_path / "other.h5"))


@pytest.mark.slow
def test_kill_9_leaves_no_half_file_and_the_next_run_finishes(tmp_path):
    """The real command, killed for good at several moments, then left to end."""
    csv = tiny_text_csv(tmp_path)
    output = tmp_path / "r.h5"
    command = [sys.executable, "-m", "optin_cli", "score", str(saved_model("bert")), "--data", str(csv)]
    command += ["-o", str(output), "--samples", "40", "--batch-size", "2", "--method", "ablation", "-q"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    partial = tmp_path / ".r.h5.partial"
    for wanted in (2, 30):
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if len(list(partial.glob("*.npz"))) >= wanted:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if process.returncode == -signal.SIGKILL:
            assert not output.exists()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    settings = ScoreSettings(method="ablation", samples=40, batch_size=2)
    plan = make_plan(open_model(str(saved_model("bert"))), DataSpec(str(csv)), settings)
    assert same_scores(read_ranking(output), stage.score(plan, tmp_path / "whole.h5"))


def test_estimate_is_a_time(tmp_path):
    for method in ("mixed", "magnitude"):
        plan = plan_for(tmp_path, settings=dataclasses.replace(SMALL, method=method))
        assert estimate_seconds(plan) >= 0


def test_progress_ends_at_its_total(tmp_path):
    seen = []
    stage.score(plan_for(tmp_path), tmp_path / "r.h5", lambda done, total, what: seen.append((done, total)))
    assert seen[-1][0] == pytest.approx(seen[-1][1])
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"method": "guess"}, "method"),
        ({"samples": 0}, "samples"),
        ({"probes": 0}, "probes"),
        ({"temperature": 0.0}, "temperature"),
        ({"output_weight": -1.0}, "output_weight=-1 is"),
        ({"precision": "half"}, "precision"),
        ({"rel_error": 1.5}, "rel_error=1.5"),
        ({"sketch_rows": -1}, "sketch_rows=-1"),
        ({"exact_band": 0.1}, "band_flops"),
        ({"band_flops": 0.1}, "band_flops"),
        ({"exact_band": 2.0, "band_flops": 0.5}, "exact_band=2"),
        ({"exact_band": 0.1, "band_flops": 0.5, "method": "ablation"}, "'ablation' has nothing"),
    ],
)
def test_settings_that_make_no_sense(change, word):
    with pytest.raises(UsageError, match=word):
        configured(ScoreSettings(**change))
