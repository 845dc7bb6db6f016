"""The kinds of files that data sets store: what they are called, and how they are decoded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from optin_cli.data import audio, images
from optin_cli.data.columns import Columns
from optin_cli.errors import param


@dataclass(frozen=True)
class Kind:
    """One kind of stored files."""

    name: str
    option: str
    """The parameter that names their column."""
    decode: Callable[[Any], Any]
    """Decode a stored file to what a processor takes. Raises `BrokenFile`."""


_IMAGES = Kind("image", param("image"), images.decode)
_RECORDINGS = Kind("recording", param("audio"), audio.decode)


def kind_of(columns: Columns) -> Kind:
    """Return the kind of the column of stored files."""
    return _RECORDINGS if columns.audio else _IMAGES
