"""Files that a data set stores, as bytes or by their path: images and recordings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optin_cli.errors import first_line


class BrokenFile(Exception):
    """A stored file that can't be used; the message says why."""


def encoded(stored: Any) -> bytes:
    """The encoded bytes of a file as a data set stores it: bytes, or `{"bytes": .., "path": ..}`.

    Raises `BrokenFile` if there are none.
    """
    if isinstance(stored, bytes):
        return stored
    content = None if stored is None else stored["bytes"]
    if content is not None:
        return content
    path = None if stored is None else stored.get("path")
    if not path:
        raise BrokenFile("there is none")
    try:
        if "://" in path:
            import fsspec

            with fsspec.open(path, "rb") as stream:
                return stream.read()
        return Path(path).read_bytes()
    except OSError as error:
        raise BrokenFile(f"it can't be read: {error.strerror or first_line(error)}") from error


def name_of(stored: Any) -> str:
    """The file's name; '' if its row does not say."""
    path = stored.get("path") if isinstance(stored, dict) else None
    return Path(path).name if path else ""
