"""Ctrl-C and SIGTERM, as schedulers send it: exceptions, so that whatever is open is closed and removed on the way out.

A library may make another exception of them, in the middle of an import above all: `exit_code` tells what arrived.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
_arrived: list[int] = []


class Terminated(BaseException):
    """The process is to end: SIGTERM has arrived."""


def install() -> None:
    """Hear both signals from now on, but one that whoever started this process has told it to ignore."""
    for number, handler in ((signal.SIGINT, _interrupt), (signal.SIGTERM, _terminate)):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def uninstall() -> None:
    """Leave both to the system: nothing is open any more, and a traceback would be noise."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def exit_code() -> int | None:
    """130 or 143, by the first signal that has arrived; None where none has."""
    return 128 + _arrived[0] if _arrived else None


def _interrupt(number: int, _: Any) -> None:
    _arrived.append(number)
    raise KeyboardInterrupt


def _terminate(number: int, _: Any) -> None:
    _arrived.append(number)
    raise Terminated


def open_streams() -> None:
    """Give standard streams that are closed, as daemons leave them, to the null device.

    Else the next file that is opened takes their place, and messages go into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115 - as long as the process lives
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:  # a path is bytes, and may be no text in the encoding of the terminal
        reconfigure(errors="surrogateescape")


def silence(number: int) -> None:
    """Send what is still to be written to a stream that takes nothing more to the null device: the interpreter would
    complain about it at its end."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)
