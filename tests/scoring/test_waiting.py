"""Two processes that are asked for the same ranking: one does the work, the other waits and takes it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from helpers import forks
from helpers.cli import FAST, run
from helpers.data import tiny_text_csv
from helpers.models import saved_model

from optin_cli.artefacts import temporary
from optin_cli.artefacts.partial import Busy, Partial
from optin_cli.artefacts.ranking import read_ranking
from optin_cli.scoring import score as stage


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "_POLL", 0.05)
    monkeypatch.setattr(stage, "_BEGINNING", 0.5)
    data = tiny_text_csv(tmp_path)
    yield ("score", saved_model("bert"), "--data", data, "-o", tmp_path / "r.h5", *FAST)
    (tmp_path / "go").touch()  # whoever works still, after a failure, ends


def slowly(monkeypatch, folder: Path):
    """Makes scoring wait at its first item until the file `go` is there; each run leaves a file `working-<id>`."""
    run_item = stage.Worker.run

    def held(self, item, report):
        (folder / f"working-{os.getpid()}").touch()
        while not (folder / "go").exists():
            time.sleep(0.02)
        return run_item(self, item, report)

    monkeypatch.setattr(stage.Worker, "run", held)


def until(condition) -> None:
    for _ in range(1500):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it never came")


def said(log: Path, text: str) -> bool:
    return log.exists() and text in log.read_text()


def test_one_works_and_the_others_take_its_ranking(tmp_path, command, monkeypatch):
    slowly(monkeypatch, tmp_path)
    first = forks.start(command, tmp_path / "1.log")
    until(lambda: any(tmp_path.glob("working-*")))
    others = [forks.start(command, tmp_path / f"{n}.log") for n in (2, 3)]
    for number in (2, 3):
        until(lambda number=number: said(tmp_path / f"{number}.log", f"waiting for process {first} on"))
    (tmp_path / "go").touch()
    assert [forks.ended(child) for child in (first, *others)] == [0, 0, 0]
    assert [path.name for path in tmp_path.glob("working-*")] == [
        f"working-{first}"
    ]  # nobody else did anything
    assert all(said(tmp_path / f"{number}.log", "as another run has just made it") for number in (2, 3))
    assert not list(tmp_path.glob(".r.h5*"))
    made = read_ranking(tmp_path / "r.h5")
    run(*command, "-q", "--force")
    assert read_ranking(tmp_path / "r.h5").digest == made.digest


def test_who_waits_takes_over_from_one_that_is_killed(tmp_path, command, monkeypatch):
    slowly(monkeypatch, tmp_path)
    first = forks.start(command, tmp_path / "1.log")
    until(lambda: any(tmp_path.glob("working-*")))
    second = forks.start(command, tmp_path / "2.log")
    until(lambda: said(tmp_path / "2.log", "waiting for"))
    os.kill(first, signal.SIGKILL)
    assert forks.ended(first) == -signal.SIGKILL
    (tmp_path / "go").touch()
    assert forks.ended(second) == 0
    assert read_ranking(tmp_path / "r.h5").sites and not list(tmp_path.glob(".r.h5*"))


def test_other_work_to_the_same_name_is_refused(tmp_path, command, monkeypatch):
    slowly(monkeypatch, tmp_path)
    first = forks.start(command, tmp_path / "1.log")
    until(lambda: any(tmp_path.glob("working-*")))
    done = run(*command, "--seed", 1, code=2)
    assert f"another run is scoring to {tmp_path / 'r.h5'} (process {first} on" in done.stderr
    (tmp_path / "go").touch()
    assert forks.ended(first) == 0


def test_a_rerun_of_what_is_there_does_not_disturb_one_that_is_forced(tmp_path, command, monkeypatch):
    run(*command, "-q")
    slowly(monkeypatch, tmp_path)
    forced = forks.start((*command, "--force"), tmp_path / "1.log")
    until(lambda: any(tmp_path.glob("working-*")))
    run(*command, "-q")  # it is up to date as it is
    assert (tmp_path / ".r.h5.partial" / "lock").exists()
    (tmp_path / "go").touch()
    assert forks.ended(forced) == 0


def test_a_lock_whose_file_is_gone_counts_for_nothing(tmp_path, monkeypatch):
    """Whoever finishes removes the folder with the lock: who opened the file just before holds nothing."""
    target = tmp_path / "r.h5"
    owner = Partial(target, {"seed": 0})
    lock, opened = owner.folder / "lock", temporary._lock

    def in_between(path):
        monkeypatch.setattr(temporary, "_lock", opened)
        owner.discard()
        found = opened_before.pop()
        owner.close()
        return found

    opened_before = [os.open(lock, os.O_RDONLY)]
    monkeypatch.setattr(temporary, "_lock", in_between)
    second = Partial(target, {"seed": 0})
    assert temporary.is_held(second.folder / "lock")
    assert os.path.samestat(os.fstat(second.lock), lock.stat())
    second.discard()
    second.close()


def test_who_waits_does_not_take_one_that_ends_for_other_work(tmp_path, command, monkeypatch):
    """The stamp goes with the folder while the lock is held on: that is no other work, however long it was waited."""
    run(*command, "-q")
    waited = []

    def busy_then_gone(target, identity):
        if len(waited) == 3:
            return Partial(target, identity)
        time.sleep(stage._BEGINNING if len(waited) == 1 else 0)
        waited.append(Busy(target, "process 1", same=len(waited) != 2))
        raise waited[-1]

    monkeypatch.setattr(stage, "Partial", busy_then_gone)
    done = run(*command, "--force")
    assert len(waited) == 3 and "as another run has just made it" in done.stderr
