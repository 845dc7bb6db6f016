"""Ctrl-C and SIGTERM end a command with its code, at any moment, and leave nothing; closed streams change nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from helpers.artefacts import tiny_ranking
from helpers.runs import hear_interrupts

from optin_cli import interrupts
from optin_cli.artefacts.ranking import write_ranking
from optin_cli.main import guarded

WORK = """
import sys, tempfile, time
from pathlib import Path
import typer
from optin_cli import interrupts
interrupts.install()
from optin_cli.artefacts.files import atomic_dir, atomic_file
from optin_cli.artefacts.temporary import scratch
from optin_cli.main import guarded

folder = Path(sys.argv[1])
tempfile.tempdir = str(folder)

def work():
    with scratch() as spilled, atomic_dir(folder / "model") as model, atomic_file(folder / "m.json") as mask:
        for path in (spilled / "0", model / "weights", mask):
            path.write_text("half")
        print("ready", flush=True)
        time.sleep(60)

try:
    guarded(work)()
except typer.Exit as end:
    sys.exit(end.exit_code)
"""
SIGNALS = [(signal.SIGTERM, 143), (signal.SIGINT, 130)]


def started(program: list[str], **options: object) -> subprocess.Popen[str]:
    """A process that has said that it is ready."""
    process = subprocess.Popen(
        [sys.executable, *program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=hear_interrupts, **options,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n", process.communicate()
    return process


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_leaves_nothing_behind(tmp_path, number, code):
    process = started(["-c", WORK, str(tmp_path)])
    assert len(list(tmp_path.iterdir())) == 3
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert "run the same command again" in said and "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_while_libraries_are_imported_is_no_traceback(tmp_path, number, code):
    (tmp_path / "typer.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    paths = f"{tmp_path}{os.pathsep}{Path(interrupts.__file__).parents[1]}"
    process = started(["-m", "optin_cli", "--help"], env={**os.environ, "PYTHONPATH": paths})
    process.send_signal(number)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == code


def test_what_a_library_makes_of_a_signal_is_still_one(monkeypatch):
    monkeypatch.setattr(interrupts, "_arrived", [signal.SIGTERM])

    def work() -> None:
        raise ImportError("numpy failed to import")

    with pytest.raises(typer.Exit) as caught:
        guarded(work)()
    assert caught.value.exit_code == 143


def test_a_signal_that_the_starter_ignores_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    term = signal.getsignal(signal.SIGTERM)
    try:
        interrupts.install()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGTERM, term)


# streams


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    write_ranking(folder / "r.h5", tiny_ranking())
    return folder


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which `optin` is the real command."""
    home = Path(interrupts.__file__).parents[1]
    whole = f'optin() {{ "{sys.executable}" -m optin_cli "$@"; }}; {line}'
    return subprocess.run(
        ["bash", "-c", whole], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(home)},
    )  # fmt: skip


@pytest.mark.parametrize("how", [">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_nobody_hears_of_work_that_is_done_all_the_same(folder, how):
    mask = folder / "m.json"
    mask.unlink(missing_ok=True)
    done = shell(f"optin select r.h5 --flops 0.5 -o m.json {how}", folder)
    assert done.returncode == 0, done.stderr
    assert mask.read_text().startswith("{\n")  # and no message went into it
    assert "Traceback" not in done.stderr and "error" not in done.stderr


def test_a_full_standard_output_is_one_message(folder):
    done = shell("optin select r.h5 --flops 0.5 -o full.json > /dev/full", folder)
    assert done.returncode == 1
    assert done.stderr.count("error:") == 1 and "standard output: No space left" in done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_an_error_that_nobody_hears_keeps_its_code(folder):
    assert shell("optin select no.h5 --flops 0.5 -o m.json 2>&-", folder).returncode == 2


def test_a_name_that_is_no_text_comes_out_as_it_is(folder):
    (folder / os.fsdecode(b"caf\xe9")).mkdir(exist_ok=True)
    line = "optin select r.h5 --flops 0.5 -o $'caf\\xe9/m.json' -q > out"
    done = shell(line, folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "out").read_bytes() == b"caf\xe9/m.json\n"
