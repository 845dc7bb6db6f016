"""docs/Makefile.example and docs/slurm.example.sh do what they say, with a tiny model.

The commands are the real ones, forked from one process that has imported everything (tests/helpers/warm.py).
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers import warm
from helpers.data import tiny_text_csv
from helpers.models import copy_of, saved_model
from helpers.pages import DOCS

from optin_cli.artefacts.files import digest_json
from optin_cli.artefacts.mask import read_mask
from optin_cli.artefacts.pruned import check_weights, read_pruned
from optin_cli.artefacts.ranking import read_ranking

BUDGETS = ("0.8", "0.6")


@pytest.fixture(scope="module")
def optin(tmp_path_factory):
    with warm.optin(tmp_path_factory.mktemp("warm")) as command:
        yield command


class Build:
    """A folder with data, a model and the example files, and what runs them."""

    def __init__(self, folder: Path, optin: Path, budgets: tuple[str, ...]) -> None:
        self.folder, self.log, self.budgets = folder, optin.with_name("started"), budgets
        copy_of(saved_model("bert"), folder / "model")
        tiny_text_csv(folder, name="train.csv")
        tiny_text_csv(folder, name="test.csv", rows=12, seed=7)
        shutil.copy(DOCS / "Makefile.example", folder / "Makefile")
        shutil.copy(DOCS / "slurm.example.sh", folder)
        (folder / "pyproject.toml").write_text(
            "[tool.optin]\ndevice = 'cpu'\ntext = 'sentence1,sentence2'\nbatch-size = 6\n"
            "[tool.optin.score]\nsamples = 12\nprobes = 1\n"
            "[tool.optin.apply]\nsamples = 12\n"
            "[tool.optin.prune]\nsamples = 12\nprobes = 1\ncompensate-samples = 12\n"
        )
        self.variables = {
            "OPTIN": str(optin), "MODEL": "model", "TRAIN": "train.csv", "TEST": "test.csv", "DATA": "",
            "BUDGETS": " ".join(budgets),
        }  # fmt: skip

    def make(self, *args: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(self.command(*args), cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done

    def command(self, *args: str) -> list[str]:
        return ["make", *args, *(f"{name}={value}" for name, value in self.variables.items())]

    def started(self) -> list[str]:
        """The commands that were started since this was asked last."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.write_text("")
        return [line.split()[0] for line in lines]

    def results(self) -> dict[str, str]:
        """What every artefact says, whenever it was made; raises where one is damaged."""
        build = self.folder / "build"
        found = {"ranking": read_ranking(build / "ranking.h5").digest}
        for budget in self.budgets:
            record = read_pruned(build / f"m-{budget}")
            check_weights(build / f"m-{budget}")
            weights = (build / f"m-{budget}" / "model.safetensors").read_bytes()
            found[f"model {budget}"] = digest_json([record.kept, hashlib.sha256(weights).hexdigest()])
            if (mask := build / f"m-{budget}.mask.json").exists():
                found[f"mask {budget}"] = read_mask(mask).digest
            found[f"eval {budget}"] = (build / f"m-{budget}.eval.json").read_text()
        return found

    def left(self) -> list[str]:
        return [path.name for path in (self.folder / "build").rglob(".*")]


@pytest.fixture
def build(tmp_path, optin, request) -> Build:
    made = Build(tmp_path, optin, getattr(request, "param", BUDGETS))
    made.started()
    return made


one_or_two_budgets = pytest.mark.parametrize(
    "build", [BUDGETS[:1], pytest.param(BUDGETS, marks=pytest.mark.slow)], ids=["one", "two"], indirect=True
)


@one_or_two_budgets
def test_a_build_its_rebuild_and_one_after_a_change(build):
    build.make("-j2")
    count = len(build.budgets)
    assert sorted(build.started()) == sorted(["score", *["select", "apply", "eval"] * count])
    before = build.results()
    assert "Nothing to be done" in build.make().stdout
    assert build.started() == []
    (build.folder / "train.csv").touch()  # nothing is another: all is kept, and then again nothing is started
    build.make()
    assert build.results() == before
    build.started()
    build.make()
    assert build.started() == []
    (build.folder / "test.csv").touch()
    build.make()
    assert build.started() == ["eval"] * count
    with (build.folder / "train.csv").open("a") as data:
        data.write("film,film,1\n")
    build.make()
    after = build.results()
    assert all(before[name] != after[name] for name in before if not name.startswith("eval"))
    assert build.left() == []


def kill(build: Build, after: float, number: int) -> bool:
    """Start a build and end all of it after some seconds; whether it was still at it."""
    running = subprocess.Popen(
        build.command("-j2"),
        cwd=build.folder,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        process_group=0,
    )
    time.sleep(after)
    caught = running.poll() is None
    if caught:
        os.killpg(running.pid, number)
    running.wait()
    until_quiet(running.pid)
    return caught


def until_quiet(group: int) -> None:
    """Wait until no process of a group is left."""
    for _ in range(500):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    raise AssertionError("a command outlived its build")


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [3, 30])
def test_a_build_that_is_killed_goes_on_and_ends_in_the_same(build, rounds):
    started = time.monotonic()
    build.make("-j2")
    duration, expected = time.monotonic() - started, build.results()
    draw, caught = random.Random(0), 0
    for round_ in range(rounds):
        shutil.rmtree(build.folder / "build")
        for number in (signal.SIGKILL, signal.SIGTERM)[: 1 + round_ % 2]:
            # later builds are quicker than the first
            caught += kill(build, draw.uniform(0, 0.6) * duration, number)
        build.make("-j2")
        assert build.results() == expected
        assert build.left() == []
    assert caught


# ---- a queue ----


def task(build: Build, number: int, **variables: str) -> subprocess.Popen[str]:
    """A task of the array, as the scheduler starts it."""
    queue = build.folder / "scontrol"
    queue.write_text(f"#!/bin/sh\necho $* >> {build.folder / 'requeued'}\n")
    queue.chmod(0o755)
    environment = {**os.environ, **build.variables, "SLURM_ARRAY_TASK_ID": str(number), "SLURM_JOB_ID": "17"}
    environment |= {"PATH": f"{build.folder}:{os.environ['PATH']}", **variables}
    return subprocess.Popen(
        ["bash", "slurm.example.sh"],
        cwd=build.folder,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


@one_or_two_budgets
def test_tasks_of_a_queue_share_one_ranking(build):
    tasks = [task(build, number) for number in range(len(build.budgets))]
    for one in tasks:
        assert one.wait() == 0, one.stderr.read()
        one.stderr.close()
    logs = "".join((build.folder / "build" / f"task-{budget}.log").read_text() for budget in build.budgets)
    assert logs.count("wrote the ranking") <= 1
    before = build.results()
    again = task(build, len(build.budgets) - 1)
    assert again.wait() == 0
    again.stderr.close()
    assert build.results() == before and build.left() == []


@pytest.mark.slow
def test_a_task_that_is_ended_is_queued_again_and_goes_on(build):
    build.variables["PRUNE"] = "--samples 60 --batch-size 1 --probes 8"  # long enough to be met at work
    first = task(build, 0)
    until(
        lambda: list((build.folder / "build").glob(".ranking.h5.partial/*.npz")) or first.poll() is not None
    )
    os.kill(first.pid, signal.SIGTERM)  # the script alone, as --signal=B: says
    assert first.wait() == 143, first.stderr.read()
    first.stderr.close()
    assert (build.folder / "requeued").read_text() == "requeue 17\n"
    assert not (build.folder / "build" / "m-0.8.eval.json").exists()
    for number in range(2):
        one = task(build, number)
        assert one.wait() == 0, one.stderr.read()
        one.stderr.close()
    assert len(build.results()) == 5 and build.left() == []


def until(condition) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came")
