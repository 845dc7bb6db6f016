"""Geometry of the page's charts: data in, coordinates out. The template draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 420, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 44
PROFILE_POINTS = 64
"""Of a curve of sorted scores: more can't be seen."""


@dataclass(frozen=True)
class Spot:
    """A measured model in a chart."""

    x: float
    y: float
    label: str
    group: str = ""
    """Spots of one group differ in their seed alone."""


@dataclass(frozen=True)
class Series:
    """Models that belong together, in a chart's own units."""

    name: str
    style: str
    """`main`, `random`, `uncompensated` or `dense`: how it is drawn."""
    spots: tuple[Spot, ...]


@dataclass(frozen=True)
class Tick:
    """A mark of an axis, in pixels."""

    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """A series in pixels."""

    name: str
    style: str
    spots: tuple[Spot, ...]
    path: str
    """Of the line through the means of the groups, in the order of the spots."""


@dataclass(frozen=True)
class Chart:
    """A chart of quality against cost."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


@dataclass(frozen=True)
class Axis:
    """From data to pixels."""

    low: float
    high: float
    first: float
    """Pixel of `low`, and `last` of `high`."""
    last: float

    def place(self, value: float) -> float:
        """The pixel of a value."""
        return round(self.first + (value - self.low) / (self.high - self.low) * (self.last - self.first), 2)

    def ticks(self) -> tuple[Tick, ...]:
        """Round numbers within the axis, five or so."""
        step = _step((self.high - self.low) / 5)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        return tuple(Tick(self.place(k * step), f"{k * step:.{digits}f}") for k in range(first, last + 1))


def _step(rough: float) -> float:
    """The nearest of 1, 2, 5 times a power of ten that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))


def axis(values: Sequence[float], first: float, last: float, share: float = 0.06) -> Axis:
    """An axis around the values with a margin of a `share` of their range; some range where all are one."""
    low, high = min(values), max(values)
    room = (high - low) * share or max(abs(high), 1.0) * 0.05
    return Axis(low - room, high + room, first, last)


def chart(title: str, x_label: str, y_label: str, several: Sequence[Series]) -> Chart:
    """Series as lines in pixels, on axes that hold all of them."""
    spots = [spot for series in several for spot in series.spots]
    across = axis([spot.x for spot in spots], LEFT, WIDTH - RIGHT)
    up = axis([spot.y for spot in spots], HEIGHT - BOTTOM, TOP)
    lines = []
    for series in several:
        placed = tuple(Spot(across.place(s.x), up.place(s.y), s.label, s.group) for s in series.spots)
        lines.append(Line(series.name, series.style, placed, _path(placed)))
    return Chart(title, x_label, y_label, tuple(lines), across.ticks(), up.ticks())


def _path(spots: Sequence[Spot]) -> str:
    groups: dict[str, list[Spot]] = {}
    for spot in spots:
        groups.setdefault(spot.group, []).append(spot)
    if len(groups) < 2:
        return ""
    means = [(fmean(s.x for s in group), fmean(s.y for s in group)) for group in groups.values()]
    return "M" + " L".join(f"{x:.1f},{y:.1f}" for x, y in means)


def marker(style: str, x: float, y: float) -> str:
    """The path of a mark of its own shape: readable without colour."""
    if style == "random":
        return f"M{x - 4:.1f},{y - 4:.1f} l8,8 m0,-8 l-8,8"
    if style == "uncompensated":
        return f"M{x - 4:.1f},{y - 4:.1f} h8 v8 h-8 z"
    if style == "dense":
        return f"M{x:.1f},{y - 6:.1f} l6,6 l-6,6 l-6,-6 z"
    return f"M{x - 4.5:.1f},{y:.1f} a4.5,4.5 0 1,0 9,0 a4.5,4.5 0 1,0 -9,0 z"


def ranks(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """[units]: each score's rank among all, from 0 (least) to 1."""
    if len(scores) < 2:
        return np.ones(len(scores))
    order = scores.argsort(kind="stable").argsort(kind="stable")
    return np.asarray(order / (len(scores) - 1))


def profile(scores: NDArray[np.float64], low: float, high: float) -> str:
    """The area under the scores from largest to smallest, in a box of 100 x 40; `low` and `high` are its edges, as
    logarithms to base ten. Scores that are not positive are at the lower edge."""
    ordered = np.sort(scores)[::-1]
    if not len(ordered):
        return ""
    places = np.linspace(0, len(ordered) - 1, min(PROFILE_POINTS, len(ordered)))
    logs = np.log10(np.maximum(ordered[places.round().astype(int)], 10.0**low))
    heights = 40 - 38 * (logs - low) / max(high - low, 1e-9)
    xs = np.linspace(0, 100, len(places)) if len(places) > 1 else np.array([0.0])
    line = " L".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, heights, strict=True))
    return f"M0,40 L{line} L100,40 z"


def log_range(several: Sequence[NDArray[np.float64]]) -> tuple[float, float]:
    """Logarithms to base ten of the lowest and highest positive score, at most five decades apart."""
    positive = np.concatenate([scores[scores > 0] for scores in several]) if several else np.array([])
    if not len(positive):
        return -1.0, 0.0
    high = math.log10(positive.max())
    return max(math.log10(positive.min()), high - 5) - 0.05, high
