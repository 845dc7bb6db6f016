"""The command line in tests: in this process, or in one of its own."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from typing import Any

import typer.testing
from typer import Typer
from typer.testing import CliRunner

from optin_cli import main

typer.testing._get_command = functools.cache(
    typer.testing._get_command
)  # all commands are built for each run else

FAST = ["--samples", "12", "--batch-size", "6", "--probes", "1"]
"""Options that make scoring a tiny model a matter of a second."""


def run(*args: object, code: int = 0, app: Typer = main.app) -> Any:
    """Run a command in this process and check its exit code."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, f"{result.stdout}\n{result.stderr}\n{result.exception!r}"
    return result


def process(*args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the real command in a process of its own."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.run(
        [sys.executable, "-m", "optin_cli", *(str(arg) for arg in args)],
        capture_output=True, text=True, env=environment, **options,
    )  # fmt: skip
