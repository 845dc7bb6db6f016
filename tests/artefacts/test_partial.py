"""Unfinished work: picked up by the same inputs, by one run at a time."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from optin_cli.artefacts import temporary
from optin_cli.artefacts.partial import Partial
from optin_cli.errors import UsageError

SAME, OTHER = {"seed": 0}, {"seed": 1}


def test_parts_of_the_same_inputs_are_found_again(tmp_path):
    first = Partial(tmp_path / "r.h5", SAME)
    first.put("a", {"x": np.ones(2)})
    first.close()
    again = Partial(tmp_path / "r.h5", SAME)
    assert again.get("a")["x"].tolist() == [1, 1]
    again.discard()
    again.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["[" * 100_000, '{"seed": ' + "9" * 5000 + "}", "", "[]", None])
def test_parts_of_other_inputs_or_without_their_stamp_are_thrown_away(tmp_path, damage):
    first = Partial(tmp_path / "r.h5", SAME)
    first.put("a", {"x": np.ones(2)})
    first.close()
    if damage is not None:
        (first.folder / "identity.json").write_text(damage)
    again = Partial(tmp_path / "r.h5", OTHER if damage is None else SAME)
    assert again.get("a") is None
    again.close()
    third = Partial(tmp_path / "r.h5", OTHER if damage is None else SAME)  # its stamp is good
    third.put("a", {"x": np.zeros(1)})
    assert len(third) == 1
    third.close()


@pytest.mark.parametrize("identity", [SAME, OTHER])
def test_two_runs_to_one_name_do_not_overwrite_each_other(tmp_path, identity):
    running = Partial(tmp_path / "r.h5", SAME)
    running.put("a", {"x": np.ones(2)})
    with pytest.raises(UsageError, match="another run is scoring to"):
        Partial(tmp_path / "r.h5", identity)
    assert running.get("a") is not None
    Partial(tmp_path / "r.h5", SAME, announce=False).close()  # of the same team
    running.close()
    Partial(tmp_path / "r.h5", SAME).close()


def test_a_run_that_finished_nothing_leaves_nothing(tmp_path):
    Partial(tmp_path / "r.h5", SAME).close()
    assert not list(tmp_path.iterdir())
    first = Partial(tmp_path / "r.h5", SAME)
    first.discard()
    second = Partial(tmp_path / "r.h5", SAME)  # begins between the two
    first.close()
    second.put("a", {"x": np.ones(2)})
    second.close()
    assert len(Partial(tmp_path / "r.h5", SAME)) == 1


def lock_of_another_machine(tmp_path: Path) -> Path:
    killed = Partial(tmp_path / "r.h5", SAME)
    killed.put("a", {"x": np.ones(2)})
    killed.close()
    lock = tmp_path / ".r.h5.partial" / "lock"
    lock.write_text("0123456789ab")
    return lock


def test_a_run_on_another_machine_is_waited_for_until_it_gives_a_sign(tmp_path, monkeypatch):
    lock = lock_of_another_machine(tmp_path)
    monkeypatch.setattr(temporary.time, "sleep", lambda _: os.utime(lock, (1, 1)))
    with pytest.raises(UsageError, match="another run"):
        Partial(tmp_path / "r.h5", SAME)


def test_a_run_on_another_machine_that_gives_none_is_dead(tmp_path, monkeypatch):
    lock = lock_of_another_machine(tmp_path)
    monkeypatch.setattr(temporary, "_POLL", 0.01)
    monkeypatch.setattr(temporary, "SILENCE", 0.1)
    Partial(tmp_path / "r.h5", SAME).close()
    assert lock.read_text() == ""
