"""kill -9 at random moments: never a damaged file, and in the end the same bytes."""

from __future__ import annotations

import os
import random
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import forks
from helpers.data import tiny_text_csv
from helpers.models import saved_model, shared_model

from optin_cli.artefacts.ranking import read_ranking
from optin_cli.data.sources import DataSpec
from optin_cli.errors import InputError
from optin_cli.scoring import score as stage
from optin_cli.scoring.plan import ScoreSettings, make_plan
from optin_cli.scoring.runner import Worker


def ranked(folder, csv, target):
    """A process that scores to `target`; its id. A start takes no time, so that nearly all kills fall into the work."""
    options = ("--samples", 16, "--batch-size", 2, "--method", "mixed", "--device", "cpu")
    return forks.start(
        ("score", saved_model("bert"), "--data", csv, "-o", target, *options), folder / "log", one_thread
    )


def one_thread():
    torch.set_num_threads(1)


def test_killed_at_random_moments_a_run_ends_with_the_same_bytes(tmp_path):
    """The moments are drawn anew in every run of the test."""
    csv = tiny_text_csv(tmp_path / "data")
    folder = tmp_path / "work"
    folder.mkdir()
    output, whole = folder / "r.h5", folder / "whole.h5"
    begun = time.monotonic()
    assert forks.ended(ranked(folder, csv, whole)) == 0, (folder / "log").read_text()
    length = time.monotonic() - begun
    parts, killed = [], 0
    for kill in range(4):
        before, run = len(parts_of(output)), ranked(folder, csv, output)
        if kill % 2:
            # a run that goes on has less to do: later kills come sooner
            time.sleep(random.uniform(0.2, 0.9) * length * 0.3)
        else:  # whatever else the machine does, some kills fall between two parts
            while len(parts_of(output)) <= before and is_running(run):
                time.sleep(0.002)
            time.sleep(random.uniform(0, 0.05) * length)
        os.kill(run, signal.SIGKILL)
        killed += forks.ended(run) == -signal.SIGKILL
        parts.append(len(parts_of(output)))
        for part in parts_of(output):
            with np.load(part) as arrays:
                assert all(arrays[name] is not None for name in arrays)
        if output.exists():
            read_ranking(output)
    assert killed >= 2
    assert any(parts)  # kills did fall into the work
    assert forks.ended(ranked(folder, csv, output)) == 0, (folder / "log").read_text()
    assert read_ranking(output).digest == read_ranking(whole).digest
    assert sorted(path.name for path in folder.iterdir()) == ["log", "r.h5", "whole.h5"]


def is_running(child):
    return not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)


def plan_for(folder, sketch_rows=32):
    csv = folder / "train.csv"
    if not csv.exists():
        tiny_text_csv(folder)
    settings = ScoreSettings(samples=12, batch_size=4, rows=24, sketch_rows=sketch_rows)
    return make_plan(shared_model("bert"), DataSpec(str(csv)), settings)


def parts_of(output):
    return sorted((output.parent / f".{output.name}.partial").glob("*.npz"))


def test_a_ranking_that_can_not_be_written_loses_no_part(tmp_path, monkeypatch):
    def full(*_):
        raise InputError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(stage, "write_ranking", full)
        with pytest.raises(InputError, match="full"):
            stage.score(plan_for(tmp_path), tmp_path / "r.h5")
    items = Worker(plan_for(tmp_path)).items()
    assert len(parts_of(tmp_path / "r.h5")) == len(items)
    with monkeypatch.context() as patch:  # there is nothing left to be done
        patch.setattr(stage.Worker, "run", lambda *_: pytest.fail("an item was done twice"))
        stage.score(plan_for(tmp_path), tmp_path / "r.h5")
    assert not parts_of(tmp_path / "r.h5")


def test_a_damaged_part_is_done_again(tmp_path, monkeypatch, caplog):
    whole = stage.score(plan_for(tmp_path), tmp_path / "whole.h5")
    with monkeypatch.context() as patch:
        patch.setattr(stage, "write_ranking", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stage.score(plan_for(tmp_path), tmp_path / "r.h5")
    short, empty, *_ = parts_of(tmp_path / "r.h5")
    short.write_bytes(short.read_bytes()[:100])
    empty.write_bytes(b"")
    found = stage.score(plan_for(tmp_path), tmp_path / "r.h5")
    assert caplog.text.count("is damaged and done again") == 2
    assert found.digest == whole.digest


def test_parts_of_a_run_killed_after_it_wrote_are_cleared(tmp_path, monkeypatch):
    monkeypatch.setattr(stage.Partial, "discard", lambda _: None)
    stage.score(plan_for(tmp_path), tmp_path / "r.h5")
    assert parts_of(tmp_path / "r.h5")
    assert stage.existing(tmp_path / "r.h5", plan_for(tmp_path)) is not None
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_room_for_the_sketch_is_looked_for_before_the_work(tmp_path, monkeypatch):
    """24 rows of 204 gradients in two terms: in the parts, and in the ranking."""
    needed = 24 * 204 * 2 * 4 * 2
    for free, fits in ((needed - 1, False), (needed, True)):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        if fits:
            stage.score(plan_for(tmp_path), tmp_path / "r.h5")
            continue
        with pytest.raises(InputError, match="sketch_rows=0"):
            stage.score(plan_for(tmp_path), tmp_path / "r.h5")
        assert not parts_of(tmp_path / "r.h5")
        stage.score(plan_for(tmp_path, sketch_rows=0), tmp_path / "without.h5")
