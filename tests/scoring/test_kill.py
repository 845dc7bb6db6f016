"""kill -9 at random moments: never a damaged file, and in the end the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers.data import tiny_text_csv
from helpers.models import saved_model, shared_model

from optin_cli.data.sources import DataSpec
from optin_cli.errors import InputError
from optin_cli.scoring import score as stage
from optin_cli.scoring.plan import ScoreSettings, make_plan
from optin_cli.scoring.runner import Worker

# One process imports everything, then forks a process for each run of the command: a start takes no time, so
# that nearly all kills fall into the work. The moments are drawn anew in every run of the test.
SCRIPT = '''
import json, os, random, signal, sys, time
from pathlib import Path
import numpy as np
import datasets, torch, transformers
from transformers import BertForSequenceClassification
from optin_cli.artefacts.ranking import read_ranking
from optin_cli.main import app
from optin_cli.scoring import runner as work
from optin_cli.scoring import score

folder, model, data = map(Path, sys.argv[1:4])
output = folder / "r.h5"

def start(target):
    """A process that runs the command; its id."""
    pid = os.fork()
    if pid:
        return pid
    os.dup2(os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.dup2(2, 1)
    options = ["--samples", "40", "--batch-size", "2", "--method", "mixed", "--device", "cpu"]
    try:
        app(["score", str(model), "--data", str(data), "-o", str(target), *options], standalone_mode=False)
    except BaseException as error:
        os._exit(getattr(error, "exit_code", 1))
    os._exit(0)

def state(read=True):
    """Every file there is can be read; how many parts are done."""
    parts = list((folder / ".r.h5.partial").glob("*.npz"))
    if read and output.exists():
        read_ranking(output)
    for part in parts if read else []:
        with np.load(part) as arrays:
            for name in arrays:
                arrays[name]
    return len(parts)

begun = time.monotonic()
assert os.waitpid(start(folder / "whole.h5"), 0)[1] == 0
length = time.monotonic() - begun
parts, killed = [], 0
for kill in range(4):
    before, pid = state(), start(output)
    if kill % 2:
        # a run that goes on has less to do: later kills come sooner
        time.sleep(random.uniform(0.2, 0.9) * length * 0.3)
    else:  # whatever else the machine does, some kills fall between two parts
        while state(read=False) <= before and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.05) * length)
    os.kill(pid, signal.SIGKILL)
    killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    parts.append(state())
assert os.waitpid(start(output), 0)[1] == 0
digests = [read_ranking(folder / name).digest for name in ("r.h5", "whole.h5")]
left = sorted(path.name for path in folder.iterdir())
print(json.dumps({"killed": killed, "parts": parts, "digests": digests, "left": left}))
'''


def test_killed_at_random_moments_a_run_ends_with_the_same_bytes(tmp_path):
    csv = tiny_text_csv(tmp_path / "data")
    folder = tmp_path / "work"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(saved_model("bert")), str(csv)],
        env={
            **os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
            "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        },
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + (folder / "log").read_text()
    told = json.loads(done.stdout)
    assert told["killed"] >= 2, told
    assert any(told["parts"]), told  # kills did fall into the work
    assert told["digests"][0] == told["digests"][1]
    assert told["left"] == ["log", "r.h5", "whole.h5"]


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
