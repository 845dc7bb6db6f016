"""All that is about CUDA, in eight minutes of one GPU: tests, latency, scores, compensation, a team, a decoder, ranks.

    python benchmarks/gpu.py [--out benchmarks/gpu] [--only scoring,bench] [--brief] [--device cpu --tiny]

Needs no data and no hub: models are random and made here, texts are random words. Each part runs in a process of its
own with a time limit, and writes OUT/PART.json step by step, so that a part that hangs or dies loses nothing else.
OUT/report.md, printed at the end, is for benchmarks/RESULTS.md. `--device cpu --tiny` tries the script out: its
numbers mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [
    str(HERE),
    str(HERE.parent),
    str(HERE.parent / "tests"),
]  # the parts, optin_cli, the tests' helpers


@dataclass(frozen=True)
class Part:
    """One module of gpu_parts."""

    seconds: float
    """Its time limit."""
    beside: bool = False
    """It times nothing, so that it may run beside others."""


PARTS = {
    "card": Part(60),
    "tests": Part(110, beside=True),
    "team": Part(90, beside=True),
    "half": Part(90, beside=True),
    "scoring": Part(100),
    "decoder": Part(150),
    "ranks": Part(60),
    "bench": Part(150),
}


_ON_A_CPU = 4.0
"""Time limits are so many times as long there."""
_LAST_WORDS = 6000
"""Characters of the failed tests' tracebacks that are printed behind the report."""


def main() -> None:
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.run:
        _run(options)
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    patience = _ON_A_CPU if options.device == "cpu" else 1.0
    end = time.perf_counter() + patience * options.seconds
    chosen = [name for name in PARTS if not options.only or name in options.only.split(",")]
    for group in _groups(chosen, together=options.device == "cuda"):
        left = end - time.perf_counter()
        limits = {name: min(patience * PARTS[name].seconds, left) for name in group if left > 5}
        started = {name: _start(name, options, seconds) for name, seconds in limits.items()}
        for name in group:
            if name in started:
                _finish(name, *started[name], options.out)
            else:
                _note(options.out, name, "no time was left for it")
    from gpu_parts.report import read, report

    text = report(read(options.out, PARTS))
    (options.out / "report.md").write_text(text)
    print(f"\n{text}", flush=True)
    print_failures(read(options.out, PARTS)["tests"])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE / "gpu", help="folder for the results")
    parser.add_argument("--only", default="", help=f"some of {','.join(PARTS)}")
    parser.add_argument("--seconds", type=float, default=470.0, help="for everything")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="small models and few examples")
    parser.add_argument("--brief", action="store_true", help="leave out what takes long and seldom changes")
    parser.add_argument("--run", default="", help=argparse.SUPPRESS)  # one part, in this process
    options = parser.parse_args()
    if unknown := set(filter(None, options.only.split(","))) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there is {', '.join(PARTS)}")
    return options


def print_failures(tests: Mapping[str, Any]) -> None:
    """The tests' tracebacks, or as much of their end as a terminal keeps."""
    if text := tests.get("failures"):
        print(f"What the tests say:\n\n{text[-_LAST_WORDS:]}", flush=True)


def _groups(names: list[str], together: bool) -> list[list[str]]:
    """Parts that run at the same time: those that time nothing, all others alone."""
    beside = [name for name in names if PARTS[name].beside] if together else []
    groups = [[name] for name in names if name not in beside]
    if beside:
        groups.insert(1 if names[0] == "card" else 0, beside)
    return groups


def _start(name: str, options: argparse.Namespace, seconds: float) -> tuple[subprocess.Popen[bytes], float]:
    (options.out / f"{name}.json").unlink(missing_ok=True)
    command = [sys.executable, __file__, "--run", name, "--out", str(options.out), "--device", options.device]
    command += ["--seconds", str(seconds), *["--tiny"] * options.tiny, *["--brief"] * options.brief]
    print(f"== {name}: at most {seconds:.0f} s", flush=True)
    return subprocess.Popen(command, start_new_session=True), time.perf_counter() + seconds


def _finish(name: str, process: subprocess.Popen[bytes], end: float, out: Path) -> None:
    try:
        code = process.wait(max(0.0, end - time.perf_counter()))
        if code:
            _note(out, name, f"ended with exit code {code}")
    except subprocess.TimeoutExpired:
        _note(out, name, "its time was up")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with whatever it has started itself
            process.wait()


def _note(out: Path, name: str, why: str) -> None:
    """Add to a part's results why they are not complete."""
    print(f"== {name}: {why}", flush=True)
    file = out / f"{name}.json"
    facts = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**facts, "stopped": why}, indent=1) + "\n")


def _run(options: argparse.Namespace) -> None:
    from gpu_parts.job import Job

    with tempfile.TemporaryDirectory(prefix="optin-gpu-") as folder:
        job = Job(
            options.run,
            options.device,
            options.tiny,
            options.out,
            Path(folder),
            options.seconds,
            options.brief,
        )
        importlib.import_module(f"gpu_parts.{options.run}").run(job)
        job.write(seconds=round(options.seconds - job.left, 1))


if __name__ == "__main__":
    main()
