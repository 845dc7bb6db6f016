"""How the site reads docstrings: an extension of griffe, which mkdocstrings collects them with.

`Example:` holds doctests, and an entry such as `batch_size, max_length: ...` describes each of its parameters.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)
_SHARED = re.compile(r"^( +)(\w+(?:,\s+\w+)+): (.*\n(?:\1 +.*\n)*)", re.MULTILINE)


def for_griffe(text: str) -> str:
    """A docstring with the headings and entries that griffe knows."""
    text = _EXAMPLE.sub(r"\1Examples:", text)
    return _SHARED.sub(lambda e: "".join(f"{e[1]}{name}: {e[3]}" for name in re.split(r",\s+", e[2])), text)


class Docstrings(griffe.Extension):
    """Rewrites each docstring as it is collected."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = for_griffe(obj.docstring.value)
