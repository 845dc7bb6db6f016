"""Commands in forked processes, in which every library is imported already: a run costs what the work costs."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from optin_cli import interrupts
from optin_cli.main import app

_HEARD = {signal.SIGINT, signal.SIGTERM}


def start(
    args: Sequence[object],
    stderr: Path | None = None,
    first: Callable[[], object] | None = None,
    stdout: Path | None = None,
) -> int:
    """Start a command; returns the id of its process. Its messages go to `stderr`, its result to `stdout`, or nowhere;
    `first` is called before it, in its process."""
    return process(lambda: code_of(args), stderr, first, stdout)


def process(
    work: Callable[[], int],
    stderr: Path | None = None,
    first: Callable[[], object] | None = None,
    stdout: Path | None = None,
) -> int:
    """The same for any work that returns an exit code."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD)  # until the child has its handlers
    child = os.fork()
    if child:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HEARD)
        return child
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), number)
    # pytest has put others there
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - as long as the process lives
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs start with it ignored
    interrupts.install()
    code = 1
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HEARD)
        if first is not None:
            first()
        code = work()
    except BaseException:
        traceback.print_exc()  # and never back into the test
        code = interrupts.exit_code() or 1
    finally:
        os._exit(code)


def code_of(args: Sequence[object]) -> int:
    """Run a command here; its exit code."""
    try:
        return int(app([str(arg) for arg in args], standalone_mode=False) or 0)
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException as error:
        if (code := interrupts.exit_code()) is not None:
            return code
        return int(getattr(error, "exit_code", 1))


def ended(child: int) -> int:
    """Wait for a process; its exit code, or the negative number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
