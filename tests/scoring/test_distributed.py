"""Several processes that score together, as torchrun and SLURM start them: real processes."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
import typer
from helpers import forks
from helpers.data import tiny_text_csv
from helpers.models import saved_model
from typer.testing import CliRunner

from optin_cli.artefacts.ranking import Ranking, read_ranking
from optin_cli.data.sources import DataSpec
from optin_cli.errors import InputError, UsageError
from optin_cli.loading.checkpoint import open_model
from optin_cli.main import app, guarded
from optin_cli.scoring import distributed as teams
from optin_cli.scoring import score as stage
from optin_cli.scoring.distributed import Team, joined
from optin_cli.scoring.plan import ScoreSettings, make_plan

SETTINGS = ScoreSettings(samples=24, batch_size=2)
OPTIONS = ["--samples", "24", "--batch-size", "2"]
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


def score_command(csv: Path, output: Path) -> list[str]:
    command = ["score", str(saved_model("bert")), "--data", str(csv), "-o", str(output)]
    return [*command, *OPTIONS, "--device", "cpu"]


def torchrun(csv: Path, output: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [*TORCHRUN, "optin_cli", *score_command(csv, output)],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finished(output: Path) -> int:
    return len(list((output.parent / f".{output.name}.partial").glob("*.npz")))


def begun_by_one(csv: Path, output: Path) -> int:
    """How many parts one process has left."""

    def stop(done, total, _):
        if done > 0.3 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage.score(plan_of(csv), output, stop)
    assert finished(output) > 0
    return finished(output)


def test_two_processes_finish_what_one_began_and_write_one_file(whole, tmp_path):
    csv, expected = whole
    output = tmp_path / "out" / "r.h5"
    output.parent.mkdir()
    begun = begun_by_one(csv, output)
    work = partial(forks.code_of, score_command(csv, output))
    children = started_by_srun([work] * 2, tmp_path)
    found = [forks.ended(child) for child in children]
    err, out = ("".join((tmp_path / f"{r}.{kind}").read_text() for r in range(2)) for kind in ("err", "out"))
    assert found == [0, 0], err
    check_team(out, err, begun, output, expected)


@pytest.mark.slow
def test_two_processes_of_torchrun_do_the_same(whole, tmp_path):
    csv, expected = whole
    output = tmp_path / "r.h5"
    begun = begun_by_one(csv, output)
    process = torchrun(csv, output)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    check_team(out, err, begun, output, expected)


def check_team(out: str, err: str, begun: int, output: Path, expected: Ranking) -> None:
    assert out == f"{output}\n"  # one of the two speaks
    assert err.count(f"resuming: {begun} parts") == len(re.findall(r"^scored ", err, re.MULTILINE)) == 1
    assert read_ranking(output).digest == expected.digest
    assert [path.name for path in output.parent.iterdir()] == ["r.h5"]


@pytest.mark.slow
def test_one_process_finishes_what_a_killed_team_began(whole, tmp_path, caplog):
    csv, expected = whole
    output = tmp_path / "r.h5"
    process = torchrun(csv, output)
    deadline = time.monotonic() + 300
    while process.poll() is None and finished(output) < 12 and time.monotonic() < deadline:
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


def started_by_srun(works: Sequence[Callable[[], int]], folder: Path) -> list[int]:
    """Two processes, started as `srun` would: by their environment alone, so that each one's own exit code shows."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])

    def known(rank: int) -> None:
        team = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ.update({**team, "MASTER_ADDR": "localhost", "MASTER_PORT": port})
        torch.set_num_threads(1)

    return [
        forks.process(work, folder / f"{rank}.err", partial(known, rank), folder / f"{rank}.out")
        for rank, work in enumerate(works)
    ]


def within(body: Callable[[Team], object]) -> int:
    def command() -> None:
        with joined() as team:
            body(team)

    try:
        guarded(command)()
    except typer.Exit as error:
        return error.exit_code
    return 0


def disagree(team: Team) -> None:
    team.check_same({"model": f"digest {team.rank}", "rows": 1})


def one_fails(team: Team) -> None:
    if not team.leads:
        raise InputError("no such data")
    team.broadcast(None)


def one_is_killed(team: Team) -> None:
    if not team.leads:
        os.kill(os.getpid(), signal.SIGKILL)
    team.broadcast(None)


@pytest.mark.parametrize(
    ("body", "codes", "message"),
    [
        (disagree, [3, 3], "process 1 has another model than process 0"),
        (one_fails, [1, 1], "no such data"),
        (one_is_killed, [1, -signal.SIGKILL], "another process of the team is gone"),
    ],
)
def test_one_process_tells_why_and_all_end(body, codes, message, tmp_path):
    children = started_by_srun([partial(within, body)] * 2, tmp_path)
    found = [forks.ended(child) for child in children]
    told = "".join((tmp_path / f"{rank}.err").read_text() for rank in range(2))
    assert found == codes, told
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
