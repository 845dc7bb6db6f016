"""A log of one run in a file: what standard error shows, with times, and how the run ended."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from optin_cli.errors import UsageError, param

_open: list[TextIO] = []


@contextmanager
def opened(path: Path | None, command: Sequence[str]) -> Iterator[None]:
    """Append to `path` from here on, beginning with the command; without a path nothing is logged.

    Raises `UsageError` where the file can't be written.
    """
    if path is None:
        yield
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
    except OSError as error:
        raise UsageError(
            f"can't write the log {path}: {error.strerror}", f"give {param('log_file')} another name"
        ) from error
    _open.append(stream)
    started = time.monotonic()
    write(" ".join(command))
    try:
        yield
    finally:
        write(f"ended after {time.monotonic() - started:.1f} s")
        _open.remove(stream)
        with suppress(OSError):  # a full disk: the work is done all the same
            stream.close()


def is_open() -> bool:
    return bool(_open)


def write(text: str) -> None:
    """Add a line, or several, to the log that is open, if one is. A disk that takes no more ends no work."""
    if not _open:
        return
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    lines = text.rstrip("\n").split("\n")
    with suppress(OSError, ValueError):
        _open[-1].write("".join(f"{now} {os.getpid()} {line}\n" for line in lines))
