"""HDF5 files that begin with a digest of the rest, so that damage is found before the HDF5 library meets it.

A hole of zeros in its tree keeps that library busy for ever, and it hears no signal then. Files without a digest, of
versions before there was one, are read in another process first, within a time and memory limit.
"""

from __future__ import annotations

import hashlib
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from optin_cli.artefacts.kinds import HDF5, SEAL

ROOM = 512
"""Bytes in front of the HDF5 data, the fewest that its user block can have."""
_SECONDS, _MEMORY = 20, 4 * 2**30
_CHUNK = 1 << 22
_PROBE = """
import sys
sys.path[:] = {path!r}
from optin_cli.artefacts.sealed import limit
limit()
from {module} import {name}
{name}({file!r})
"""


def seal(content: memoryview) -> None:
    """Write the digest of an HDF5 file with a user block of `ROOM` bytes into that block."""
    line = SEAL + hashlib.sha256(content[ROOM:]).hexdigest().encode() + b"\n"
    content[: len(line)] = line


def is_whole(path: Path, probe: Callable[[str], None]) -> bool | None:
    """Return whether a file is as it was written; None where it is no HDF5 file at all.

    `probe` is a function that reads the file, by its module and name: it is called in another process for a file
    without a digest.
    """
    with path.open("rb") as stream:
        head = stream.read(ROOM)
        if head.startswith(HDF5):
            return _survives(path, probe)
        if not head.startswith(SEAL):
            return None
        sha = hashlib.sha256()
        while chunk := stream.read(_CHUNK):
            sha.update(chunk)
    line = SEAL + sha.hexdigest().encode() + b"\n"
    return head == line.ljust(ROOM, b"\0")


def _survives(path: Path, probe: Callable[[str], None]) -> bool:
    """Return whether reading a file ends, whatever it finds."""
    program = _PROBE.format(
        path=sys.path, module=probe.__module__, name=probe.__qualname__, file=str(path.absolute())
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, stdin=subprocess.DEVNULL, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def limit() -> None:
    """Bound the memory of this process."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
