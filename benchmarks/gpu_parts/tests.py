"""`pytest -m cuda`: what the suite checks on a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from gpu_parts.job import Job

_OUTCOME = re.compile(r"(\S+::\S.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")


def run(job: Job) -> None:
    watched(job, "tests/cuda")


def watched(job: Job, tests: str) -> None:
    """Run the marked tests of a file or folder; write outcomes as they come, then tracebacks and the log's end."""
    root = Path(__file__).resolve().parents[2]
    # the project's own `-q` would take `-v` back
    command = [
        sys.executable, "-m", "pytest", tests, "-m", "cuda", "-o", "addopts=--import-mode=importlib",
        "-v", "--tb=short", "--durations=8", "-p", "no:cacheprovider",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    if job.device == "cpu":
        environment["OPTIN_DRY_RUN"] = "1"
    log = job.out / "tests.log"  # it stays, whatever stops this process
    with log.open("w", buffering=1) as stream:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=root
        )
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            stream.write(line)
            tally(job, line)
        code = process.wait()
    text = log.read_text()
    job.write(exit_code=code, dry_run=job.device == "cpu", failures=failures(text), log=text[-20000:])


def tally(job: Job, line: str) -> None:
    """Count a test's outcome as soon as it is known."""
    if found := _OUTCOME.match(line):
        outcomes = {**job.facts.get("outcomes", {}), found[1]: found[2].lower()}
        counts = {name: list(outcomes.values()).count(name) for name in sorted(set(outcomes.values()))}
        job.write(outcomes=outcomes, counts=counts)


def failures(log: str) -> str:
    """The tracebacks of a log and pytest's summary of them; of a run that broke off, the end of its log."""
    found = re.search(r"^=+ (FAILURES|ERRORS) =+$", log, re.MULTILINE)
    if found:
        return log[found.start() :]
    return "" if re.search(r"^=+ .*\bpassed\b", log, re.MULTILINE) else log[-4000:]
