"""Processes that a benchmark starts and measures."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

_BETWEEN = """
import os, subprocess, sys, time
started = time.perf_counter()
process = subprocess.Popen(sys.argv[1:])
_, status, usage = os.wait4(process.pid, 0)
print(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@dataclass(frozen=True)
class Spent:
    """What a process printed and took."""

    stdout: str
    wall: float
    """Seconds, its start included."""
    cpu: float
    """Processor seconds of all its threads."""
    peak: float
    """Resident memory, MiB, Python and its libraries included."""


def run(command: Sequence[object]) -> Spent:
    """Run a command to its end. Raises `CalledProcessError` where that is a failure.

    A small process starts it: `ru_maxrss` of a new one begins at the resident memory of the one that starts it.
    """
    words = [sys.executable, "-c", _BETWEEN, *map(str, command)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    *printed, measured = done.stdout.splitlines()
    return Spent("\n".join(printed), *map(float, measured.split()))
