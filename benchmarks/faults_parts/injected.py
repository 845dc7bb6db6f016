"""Signals, full disks, and folders that vanish or can't be written, at random moments of every command."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from helpers import forks

from faults_parts.pipeline import Step

NUMBERS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}
Found = dict[str, Counter[str]]
NOBODY = 65534
_PIPE = 1 << 16
"""Bytes that a command may say before somebody listens."""


def signals(steps: list[Step], runs: int, draw: random.Random) -> Found:
    """A signal at a random moment. Commands without an output get a fourth of the runs."""
    found: Found = {}
    for step in steps:
        duration, expected = undisturbed(step)
        for number in NUMBERS:
            outcomes: Counter[str] = Counter()
            for _ in range(runs if step.output else max(1, runs // 4)):
                step.clear()
                child = forks.start(step.args)
                time.sleep(draw.uniform(0, duration))
                os.kill(child, number)
                code = forks.ended(child)
                wrong = None if code in (0, CODES[number]) else f"EXIT {code}"
                outcomes[wrong or after(step, expected, finished=code == 0)] += 1
            found[f"{step.name}, {signal.Signals(number).name}"] = outcomes
        again(step)
    return found


def undisturbed(step: Step) -> tuple[float, str]:
    """Seconds of a run that nothing happens to, and what it writes."""
    step.clear()
    started = time.perf_counter()
    assert forks.ended(forks.start(step.args)) == 0, step.name
    return time.perf_counter() - started, step.said()


def again(step: Step) -> None:
    """Leave the output there for the commands to come."""
    assert forks.ended(forks.start(step.args)) == 0, step.name


def after(step: Step, expected: str, *, finished: bool) -> str:
    """What a run that something happened to has left, and what the next one makes of it."""
    try:
        if step.output is not None and step.output.exists() and not _part_of(step, expected):
            return "ANOTHER RESULT"
    except Exception as error:
        return f"DAMAGED: {type(error).__name__}"
    if forks.ended(forks.start(step.args)) != 0:
        return "RERUN FAILS"
    if step.said() != expected:
        return "RERUN DIFFERS"
    if step.left():
        return f"LEFT {len(step.left())}"
    return "finished" if finished else "stopped, and the rerun is the same"


def _part_of(step: Step, expected: str) -> bool:
    """Whether an output is what was expected; of a sweep whole points may be missing."""
    if step.name != "sweep":
        return step.said() == expected
    if any(step.output.glob("*.point.json")):  # type: ignore[union-attr]
        step.said()
    return True


def full_disks(steps: list[Step], runs: int, draw: random.Random) -> Found:
    """No file grows beyond a random size: as on a disk that fills up, some write fails."""
    found: Found = {}
    for step in (one for one in steps if one.output):
        _, expected = undisturbed(step)
        largest = max(p.stat().st_size for p in _files(step.output))  # type: ignore[arg-type]
        outcomes: Counter[str] = Counter()
        for _ in range(runs):
            step.clear()
            limit = int(largest ** draw.uniform(0.5, 1.02))
            outcomes[_told(step, expected, lambda limit=limit: _no_larger(limit), (1,))] += 1  # type: ignore[misc]
        found[f"{step.name}, full disk"] = outcomes
        again(step)
    return found


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]


def _no_larger(limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def read_only(steps: list[Step], runs: int) -> Found:
    """A folder that can't be written, for a user who is not root."""
    found: Found = {}
    for step in (one for one in steps if one.output):
        _, expected = undisturbed(step)
        outcomes: Counter[str] = Counter()
        for _ in range(runs):
            step.clear()
            outcomes[_told(step, expected, lambda: os.setuid(NOBODY), (2,))] += 1
        found[f"{step.name}, read-only folder"] = outcomes
        again(step)
    return found


def vanishing(steps: list[Step], runs: int, draw: random.Random) -> Found:
    """The folder of the output is removed at a random moment."""
    found: Found = {}
    for step in (one for one in steps if one.output):
        duration, expected = undisturbed(step)
        outcomes: Counter[str] = Counter()
        for _ in range(runs):
            step.clear()
            outcomes[_told(step, expected, None, (1, 2, 3), draw.uniform(0, duration))] += 1
        found[f"{step.name}, folder removed"] = outcomes
        again(step)
    return found


def _told(
    step: Step,
    expected: str,
    first: Callable[[], None] | None,
    codes: tuple[int, ...],
    removed: float | None = None,
) -> str:
    """Run a command with a fault: it finishes, or says so in one message and leaves nothing damaged."""
    assert step.output is not None
    log = step.output.parents[1] / "log"
    log.unlink(missing_ok=True)
    os.mkfifo(log)  # no limit on the size of files stops what is said
    heard = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    child = forks.start(step.args, log, first)
    if removed is not None:
        time.sleep(removed)
        shutil.rmtree(step.output.parent, ignore_errors=True)
    code = forks.ended(child)
    with os.fdopen(heard, "rb") as stream:
        said = (stream.read(_PIPE) or b"").decode()
    if code not in (0, *codes):
        return f"EXIT {code}"
    if code and (said.count("error:") != 1 or "unexpected" in said or "Traceback" in said):
        print(said, file=sys.stderr)
        return "ODD MESSAGE"
    outcome = after(step, expected, finished=code == 0)
    return outcome.replace("stopped", "refused")
