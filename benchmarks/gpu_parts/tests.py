"""`pytest -m cuda`: what the suite checks on a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from gpu_parts.job import Job


def run(job: Job) -> None:
    root = Path(__file__).resolve().parents[2]
    command = [
        sys.executable, "-m", "pytest", "tests/cuda", "-m", "cuda", "-v", "--tb=short", "--durations=8",
        "-p", "no:cacheprovider",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    if job.device == "cpu":
        environment["OPTIN_DRY_RUN"] = "1"
    log = job.folder / "tests.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=root
        )
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            stream.write(line)
            tally(job, line)
        job.write(exit_code=process.wait(), dry_run=job.device == "cpu", log=log.read_text()[-20000:])


def tally(job: Job, line: str) -> None:
    """Count a test's outcome as soon as it is known."""
    if found := re.match(r"(\S+::\S.*?) (PASSED|FAILED|ERROR|SKIPPED)", line):
        outcomes = {**job.facts.get("outcomes", {}), found[1]: found[2].lower()}
        counts = {name: list(outcomes.values()).count(name) for name in sorted(set(outcomes.values()))}
        job.write(outcomes=outcomes, counts=counts)
