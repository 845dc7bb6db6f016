"""Ctrl-C and SIGTERM end a command with its code, at any moment, and leave nothing; closed streams change nothing."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import typer
from helpers.artefacts import tiny_ranking
from helpers.runs import hear_interrupts

from optin_cli import interrupts
from optin_cli.artefacts.ranking import write_ranking
from optin_cli.errors import InputError
from optin_cli.main import guarded

WORK = """
import sys, tempfile, time
from pathlib import Path
import typer
from optin_cli import interrupts
interrupts.install()
from optin_cli.artefacts.files import atomic_dir, atomic_file
from optin_cli.artefacts.temporary import scratch
from optin_cli.errors import InputError
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


@pytest.mark.parametrize("error", [ImportError("numpy failed to import"), InputError("torch can't trace it")])
def test_what_a_library_makes_of_a_signal_is_still_one(monkeypatch, capfd, error):
    """Whether we say in words what it made of it or not."""
    monkeypatch.setattr(interrupts, "_arrived", [signal.SIGTERM])

    def work() -> None:
        raise error

    with pytest.raises(typer.Exit) as caught:
        guarded(work)()
    assert caught.value.exit_code == 143
    assert str(error) not in capfd.readouterr().err


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


@pytest.mark.parametrize(
    "how",
    ["<&- >&- 2>&-", "2>/dev/full", *(pytest.param(how, marks=pytest.mark.slow) for how in (">&-", "2>&-"))],
)
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


COLOUR = re.compile(r"\x1b\[[\d;]*(?:3[0-7]|4[0-7]|9[0-7])[\d;]*m")
_PARTS = re.compile(r"\x1b\[[\d;]*m|[─━│┃╭╮╰╯\s]")


def terminal(line: str, folder: Path, columns: int = 80, **env: str) -> str:
    """What a command writes to a terminal, with its codes."""
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns), **env}
    for name in {"NO_COLOR", "FORCE_COLOR"} - set(env):
        environment.pop(name, None)
    command = [sys.executable, "-m", "optin_cli", *line.split()]
    running = subprocess.Popen(
        command, cwd=folder, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
    )
    os.close(slave)
    parts: list[bytes] = []
    with suppress(OSError):  # the terminal is gone when its last process is
        while part := os.read(master, 4096):
            parts.append(part)
    os.close(master)
    running.wait(60)
    return b"".join(parts).decode()


def test_colours_are_for_terminals_that_want_them(folder):
    line = "select no.h5 --flops 0.5 -o m.json"
    plain = terminal(line, folder, NO_COLOR="1")
    assert "error: no ranking at no.h5" in plain.replace("\x1b[0m", "") and not COLOUR.search(plain)
    assert COLOUR.search(terminal(line, folder))


def test_twenty_columns_cut_nothing_off(folder):
    wide, narrow = (terminal("inspect r.h5", folder, columns) for columns in (200, 20))
    words = re.findall(r"[\w.]{3,}", re.sub(r"\x1b\[[\d;]*m", "", wide))
    shown = _PARTS.sub("", narrow)
    assert "Traceback" not in narrow and len(words) > 20
    assert [word for word in words if word not in shown] == []


def test_the_c_locale_takes_names_in_other_letters(folder):
    name = "mod\u00e8le \u6a21\u578b"
    (folder / name).mkdir()
    ascii_only = "LC_ALL=C LANG=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0"
    done = shell(f"{ascii_only} optin select r.h5 --flops 0.5 -o '{name}/m.json' -q > out", folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "out").read_bytes() == f"{name}/m.json\n".encode()
    assert shell(f"{ascii_only} optin inspect '{name}/m.json'", folder).returncode == 0
    missing = shell(f"{ascii_only} optin inspect '{name}/no.json'", folder)
    assert missing.returncode == 2 and missing.stderr.count("error:") == 1
    assert "Traceback" not in missing.stderr and "unexpected" not in missing.stderr


def test_without_a_terminal_there_are_no_codes_and_nothing_is_asked(folder):
    done = shell("optin select r.h5 --flops 0.5 -o plain.json < /dev/null; optin inspect plain.json", folder)
    assert done.returncode == 0 and "plain.json" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
