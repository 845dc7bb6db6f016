"""Charts of plain characters, for a terminal of 80 columns and for a pipe: bars and heat maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from optin_cli.artefacts.ranking import RankedSite
from optin_cli.reporting.charts import log_range, ranks

WIDTH = 80
_SHADES, _ASCII_SHADES = "·░▒▓█", ".:+*#"
_BAR, _ASCII_BAR = ("█", "░"), ("#", "-")
_LABEL, _NOTE = 24, 20
"""Columns of labels and notes at most."""


@dataclass(frozen=True)
class Row:
    """A line of a drawing."""

    label: str
    marks: str
    note: str = ""

    def text(self, label: int, marks: int) -> str:
        """The line, with so many columns for label and marks."""
        return f"{_shortened(self.label, label):<{label}} {self.marks:<{marks}} {self.note}".rstrip()


def lines(rows: Sequence[Row]) -> list[str]:
    """The rows as text, aligned."""
    label = min(max((len(row.label) for row in rows), default=0), _LABEL)
    marks = max((len(row.marks) for row in rows), default=0)
    return [row.text(label, marks) for row in rows]


def bars(shares: Mapping[str, float], notes: Mapping[str, str], *, plain: bool = False) -> list[Row]:
    """A bar for each name, of its share in [0, 1]."""
    full, empty = _ASCII_BAR if plain else _BAR
    label = min(max(map(len, shares), default=0), _LABEL)
    note = min(max((len(notes.get(name, "")) for name in shares), default=0), _NOTE)
    width = WIDTH - label - note - 2
    found = []
    for name, share in shares.items():
        filled = round(width * min(max(share, 0.0), 1.0))
        found.append(Row(name, full * filled + empty * (width - filled), notes.get(name, "")))
    return found


def heat(sites: Sequence[RankedSite], *, plain: bool = False) -> list[Row]:
    """The units of each site in order, shaded in fifths of the ranks of their scores among all; in as many lines as
    they need."""
    shades = _ASCII_SHADES if plain else _SHADES
    if not sites:
        return []
    order = ranks(np.concatenate([site.score for site in sites]))
    found, start = [], 0
    for site in sites:
        here = order[start : start + site.units]
        start += site.units
        found += _wrapped(site.name, "".join(shades[min(int(5 * rank), 4)] for rank in here))
    return found


def kept(keep: Mapping[str, Sequence[int]], units: Mapping[str, int], *, plain: bool = False) -> list[Row]:
    """The units of each site in order: filled where they are kept, a dot where they are removed."""
    shades = _ASCII_SHADES if plain else _SHADES
    found = []
    for name, count in units.items():
        there = set(keep[name])
        marks = "".join(shades[-1] if unit in there else shades[0] for unit in range(count))
        found += _wrapped(name, marks, f"{len(there)}/{count}")
    return found


def log_shares(sites: Sequence[RankedSite]) -> dict[str, float]:
    """Site -> place of the median of its scores on a logarithmic axis of all scores, in [0, 1]."""
    low, high = log_range([site.score for site in sites])
    medians = {site.name: float(np.median(site.score)) if site.units else 0.0 for site in sites}
    return {
        name: (np.log10(median) - low) / (high - low) if median > 0 else 0.0
        for name, median in medians.items()
    }


def _wrapped(label: str, marks: str, note: str = "") -> list[Row]:
    """The marks in as many lines as they need, doubled where there is room for that."""
    room = WIDTH - _LABEL - 1 - (len(note) + 1 if note else 0)
    wide = "".join(mark * 2 for mark in marks)
    marks = wide if len(wide) <= room else marks
    parts = [marks[start : start + room] for start in range(0, len(marks), room)] or [""]
    return [Row(label if n == 0 else "", part, note if n == 0 else "") for n, part in enumerate(parts)]


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."
