"""Images decoded in other processes: the same batches, the same errors, and nobody left behind."""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from helpers import forks
from helpers.data import tiny_image_folder
from helpers.models import saved_model, shared_model

from optin_cli.data import workers
from optin_cli.data.batches import Batches
from optin_cli.data.examples import sample
from optin_cli.data.sources import DataSpec
from optin_cli.data.workers import in_order, worker_count
from optin_cli.errors import InputError, UsageError


def batches(folder: Path, name: str, processes: int | None) -> Batches:
    found = sample(DataSpec(str(folder), workers=processes), "image", None, 0)
    return Batches(found, shared_model(name).processor, 3)


@pytest.mark.parametrize("name", ["vit", pytest.param("deit", marks=pytest.mark.slow), "timm-vit"])
def test_workers_change_no_bit(name, tmp_path):
    folder = tiny_image_folder(tmp_path / "d", 10)
    plain = list(batches(folder, name, 0))
    for processes in (1, 2):
        for one, other in zip(plain, batches(folder, name, processes), strict=True):
            assert one.example_ids == other.example_ids
            assert one.inputs.keys() == other.inputs.keys()
            for key in one.inputs:
                assert torch.equal(one.inputs[key], other.inputs[key])


def _square(index: int) -> tuple[int, int]:
    return index * index, os.getpid()


@pytest.mark.parametrize(("count", "processes"), [(0, 2), (1, 2), (7, 0), (7, 1), (7, 2)])
def test_results_come_in_order_from_so_many_processes(count, processes):
    found = list(in_order(_square, count, processes))
    assert [value for value, _ in found] == [i * i for i in range(count)]
    others = {pid for _, pid in found} - {os.getpid()}
    assert len(others) == min(processes, count)


def test_more_processes_than_cores_are_nobodys_worry(recwarn):
    assert len(list(in_order(_square, 3, len(os.sched_getaffinity(0)) + 1))) == 3
    assert not recwarn.list


def test_workers_draw_nothing_from_the_common_generator():
    before = torch.get_rng_state()
    assert len(list(in_order(_square, 3, 1))) == 3
    assert torch.equal(torch.get_rng_state(), before)


def _fails(index: int) -> int:
    if index == 2:
        raise InputError("the third fails", "leave it out")
    return index


@pytest.mark.parametrize("processes", [0, 1])
def test_an_error_is_the_same_from_anywhere(processes):
    found = []
    with pytest.raises(InputError) as caught:
        for value in in_order(_fails, 5, processes):
            found.append(value)
    assert (caught.value.what, caught.value.hint, found) == ("the third fails", "leave it out", [0, 1])


def _children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


def until(condition: Callable[[], bool], seconds: float = 60) -> bool:
    """Wait for a condition; False if it does not come true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


def test_whoever_stops_early_leaves_no_process():
    before = _children()
    results = in_order(_square, 50, 2)
    next(results)
    assert len(_children() - before) == 2
    results.close()
    assert until(lambda: _children() <= before)


@pytest.mark.parametrize(
    "name", ["timm-vit", *(pytest.param(n, marks=pytest.mark.slow) for n in ("vit", "deit"))]
)
def test_batches_can_be_sent_to_a_process_that_is_not_forked(name, tmp_path):
    made = batches(tiny_image_folder(tmp_path / "d", 3), name, 0)
    sent = pickle.loads(pickle.dumps(made))
    assert torch.equal(next(iter(sent[0].inputs.values())), next(iter(made[0].inputs.values())))


@pytest.mark.parametrize(
    ("cores", "team", "expected"), [(1, 1, 0), (2, 1, 1), (4, 1, 3), (64, 1, 4), (64, 2, 2), (4, 8, 0)]
)
def test_how_many_there_are(cores, team, expected, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(team))
    assert worker_count(None, 10_000) == expected
    assert worker_count(None, workers._FEW - 1) == 0
    assert worker_count(7, 1) == 7
    assert worker_count(0, 10_000) == 0


def test_fewer_than_none_is_a_usage_error():
    with pytest.raises(UsageError, match="workers=-1"):
        DataSpec("d", workers=-1)


def test_an_interrupt_ends_all(tmp_path):
    """Ctrl-C reaches every process of a terminal. Without it, this run takes half a minute."""
    pids, log = tmp_path / "pids", tmp_path / "log"
    pids.mkdir()
    decoded = Batches._decoded

    def slow(self, index):
        if index > 1:
            (pids / str(os.getpid())).touch()
            time.sleep(1)
        return decoded(self, index)

    def slow_terminal():
        os.setsid()
        Batches._decoded = slow

    model, data = saved_model("timm-vit"), tiny_image_folder(tmp_path / "d", 60)
    command = ["eval", model, "--baseline", model, "--data", data, "--split", "train"]
    running = forks.start([*command, "--workers", 2, "--batch-size", 1], log, slow_terminal)
    try:
        assert until(lambda: len(list(pids.iterdir())) == 2, 120)
    finally:
        os.killpg(running, signal.SIGINT)
    assert forks.ended(running) == 130, log.read_text()
    assert "interrupted" in log.read_text()
    assert "Traceback" not in log.read_text()
    left = [int(path.name) for path in pids.iterdir()]
    assert until(lambda: not any(psutil.pid_exists(pid) for pid in left))
