"""Several processes that score together, as torchrun and SLURM start them: real processes."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from helpers.data import tiny_text_csv
from helpers.models import saved_model
from typer.testing import CliRunner

from optin_cli.artefacts.ranking import read_ranking
from optin_cli.data.sources import DataSpec
from optin_cli.errors import UsageError
from optin_cli.loading.checkpoint import open_model
from optin_cli.main import app
from optin_cli.scoring import distributed as teams
from optin_cli.scoring import score as stage
from optin_cli.scoring.distributed import Team, joined
from optin_cli.scoring.plan import ScoreSettings, make_plan

SETTINGS = ScoreSettings(samples=40, batch_size=2)
OPTIONS = ["--samples", "40", "--batch-size", "2"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]


@pytest.fixture(autouse=True)
def one_thread():
    """As torchrun gives each process: another number of threads adds in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(data, ranking) that one process makes without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    csv = tiny_text_csv(folder)
    torch.set_num_threads(1)
    return csv, stage.score(plan_of(csv), folder / "r.h5")


def plan_of(csv):
    return make_plan(open_model(str(saved_model("bert")), device="cpu"), DataSpec(str(csv)), SETTINGS)


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **more}


def torchrun(csv: Path, output: Path) -> subprocess.Popen:
    command = [*TORCHRUN, "optin_cli", "score", str(saved_model("bert")), "--data", str(csv)]
    return subprocess.Popen(
        [*command, "-o", str(output), *OPTIONS, "--device", "cpu"],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finished(output: Path) -> int:
    return len(list((output.parent / f".{output.name}.partial").glob("*.npz")))


def test_two_processes_finish_what_one_began_and_write_one_file(whole, tmp_path):
    csv, expected = whole
    output = tmp_path / "r.h5"

    def stop(done, total, _):
        if done > 0.3 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage.score(plan_of(csv), output, stop)
    begun = finished(output)
    assert begun > 0
    process = torchrun(csv, output)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out == f"{output}\n"  # one of the two speaks
    assert err.count(f"resuming: {begun} parts") == len(re.findall(r"^scored ", err, re.MULTILINE)) == 1
    assert read_ranking(output).digest == expected.digest
    assert [path.name for path in tmp_path.iterdir()] == ["r.h5"]


@pytest.mark.slow
def test_one_process_finishes_what_a_killed_team_began(whole, tmp_path, caplog):
    csv, expected = whole
    output = tmp_path / "r.h5"
    process = torchrun(csv, output)
    deadline = time.monotonic() + 300
    while process.poll() is None and finished(output) < 20 and time.monotonic() < deadline:
        time.sleep(0.005)
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        one.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not output.exists()
    with caplog.at_level("INFO", logger="optin"):
        found = stage.score(plan_of(csv), output)
    assert "resuming" in caplog.text
    assert found.digest == expected.digest


SCRIPT = """
import os, signal, sys, typer
from optin_cli.errors import InputError
from optin_cli.main import guarded
from optin_cli.scoring.distributed import joined

def command():
    with joined() as team:
        {body}

try:
    guarded(command)()
except typer.Exit as error:
    sys.exit(error.exit_code)
"""
BODIES = {
    "disagree": "team.check_same({'model': f'digest {team.rank}', 'rows': 1})",
    "one fails": "team.broadcast(None if team.leads else (_ for _ in ()).throw(InputError('no such data')))",
    "one is killed": "team.broadcast(None) if team.leads else os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.mark.parametrize(
    ("body", "codes", "message"),
    [
        ("disagree", [3, 3], "process 1 has another model than process 0"),
        pytest.param("one fails", [1, 1], "no such data", marks=pytest.mark.slow),
        pytest.param(
            "one is killed",
            [1, -signal.SIGKILL],
            "another process of the team is gone",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_one_process_tells_why_and_all_end(body, codes, message):
    """Started as `srun` would: by their environment alone, so that each one's own exit code shows."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    here = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT.format(body=BODIES[body])],
            env=environment(**here, RANK=str(rank), LOCAL_RANK=str(rank)),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = "".join(process.communicate(timeout=120)[1] for process in processes)
    assert [process.returncode for process in processes] == codes, told
    assert told.count("error:") == 1
    assert message in " ".join(told.split())


def test_alone_there_is_nothing_to_send():
    with joined() as team:
        assert (team.rank, team.size, team.leads) == (0, 1, True)
        assert team.share([1, 2, 3]) == [1, 2, 3]
        assert team.gather("mine") == ["mine"]
        assert team.broadcast("leader's") == team.first(lambda: "leader's") == "leader's"
        team.check_same({"model": "a"})
        team.check_others()


def test_shares_are_everything_once():
    shares = [Team(rank, 3).share(list(range(10))) for rank in range(3)]
    assert sorted(item for share in shares for item in share) == list(range(10))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_half_an_environment_is_a_usage_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UsageError, match=r"RANK(.|\n)*torchrun"), joined():
        pass


@contextmanager
def two():
    yield Team(0, 2)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["prune", "nothing", "--flops", "0.5"], "`optin prune` is the work of one process"),
        (["score", "nothing", "--device-map", "auto"], "several processes want one each"),
    ],
)
def test_what_a_team_can_not_do(command, words, monkeypatch, tmp_path):
    monkeypatch.setattr(teams, "joined", two)
    result = CliRunner().invoke(app, [*command, "--data", "no.csv", "-o", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
