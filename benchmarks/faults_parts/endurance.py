"""Many runs in a row in one process, and the memory of each command as the model grows."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
from helpers import forks

from faults_parts.pipeline import Step, commands, quiet, warmed

MIB = 2**20
PIPELINE = ("score", "select", "apply", "eval")
SIZES = {
    "1x": {"hidden_size": 64},
    "2x": {"hidden_size": 128},
    "4x": {"hidden_size": 256},
    "8x": {"hidden_size": 512},
}
"""Width of the model -> its settings; the feed-forward layers grow with it."""


def soak(steps: list[Step], runs: int) -> list[str]:
    """A pipeline again and again, every output made anew: what it holds after some runs and at the end."""
    chosen = [step for step in steps if step.name in PIPELINE]
    process, rows = psutil.Process(), []
    temporary = Path(tempfile.gettempdir())
    for run in range(1, runs + 1):
        for step in chosen:
            step.clear()
            with quiet():
                code = forks.code_of(step.args)
            assert code == 0, f"run {run}: {step.name} ends with {code}"
            assert not step.left(), f"run {run}: {step.name} leaves {step.left()}"
        if run in (10, runs // 4, runs // 2, runs):
            files = len(list(temporary.iterdir()))
            held = f"{process.memory_info().rss / MIB:.0f} MiB | {process.num_fds()} | {threading.active_count()}"
            rows.append(f"| {run} | {held} | {files} |")
    return [
        "| pipelines | resident memory | open files | threads | files in TMPDIR |",
        "|---|---|---|---|---|",
        *rows,
    ]


def growth(folder: Path, show: Callable[[str], None]) -> list[str]:
    """Peak memory of each command in a process of its own, above that of one that does nothing."""
    table: dict[str, dict[str, float]] = {}
    weights = {}
    for size, settings in SIZES.items():
        place = folder / size
        steps = commands(place, intermediate_size=4 * settings["hidden_size"], **settings)
        weights[size] = (place / "model" / "model.safetensors").stat().st_size / MIB
        warmed(steps[:3])
        idle = _peak(["config", "-q"])
        for step in steps:
            if step.output is not None or step.name in ("bench", "eval"):
                step.clear()
                table.setdefault(step.name, {})[size] = _peak(step.args) - idle
                show(f"{size} {step.name}")
        shutil.rmtree(place)
    head = [f"{size}: {weight:.1f} MiB" for size, weight in weights.items()]
    rows = [f"| {name} | {' | '.join(f'{peaks[s]:.0f}' for s in SIZES)} |" for name, peaks in table.items()]
    return [f"| MiB above idle; weights | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|", *rows]


def _peak(args: list[object]) -> float:
    """MiB that a command had at most."""
    child = forks.start(args)
    _, status, used = os.wait4(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, args
    return used.ru_maxrss / 1024
