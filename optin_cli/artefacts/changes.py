"""Which inputs of an output are others than those it was made from: what the commands explain when asked."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger("optin.explain")
"""Silent unless a command is to explain itself."""
_DIGEST = re.compile("[0-9a-f]{64}")
_LONGEST = 60


@dataclass(frozen=True)
class Change:
    """One input that differs."""

    name: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name} was {_short(self.was)}, is {_short(self.now)}"


def _short(value: Any) -> str:
    text = "not given" if value is None else str(value)
    if _DIGEST.fullmatch(text):
        return text[:12]
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}.."


def changes(
    was: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str] | None = None
) -> list[Change]:
    """What differs between two sets of inputs, by name; what either lacks is None there. By default those of `now`."""
    pairs = [(name, was.get(name), now.get(name)) for name in (now if names is None else names)]
    return [Change(name, before, after) for name, before, after in pairs if before != after]


def is_asked() -> bool:
    """Whether what `explain` says is heard."""
    return log.isEnabledFor(logging.INFO)


def explain_new(path: Path) -> None:
    log.info("%s: it is not there yet", path)


def explain(path: Path, found: Iterable[Change], compared: Iterable[str]) -> None:
    """Say what differs at an output, or what was compared where nothing does."""
    if said := [str(change) for change in found]:
        log.info("%s: %s", path, "; ".join(said))
    else:
        log.info("%s: up to date, with the same %s", path, ", ".join(compared))
