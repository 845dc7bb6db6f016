"""Layouts of a projection's units other than part after part: unit by unit, or once for a group of heads."""

from __future__ import annotations

from collections.abc import Mapping

Reached = frozenset[int]
"""Outputs of a layer that something is made of."""


def is_by_unit(reached: Reached, parts: int, features: int) -> bool:
    """Return whether the outputs behind a feature are adjacent in a fused projection, rather than one in each part."""
    if parts == 1 or len(reached) < 2:
        return False
    span = max(reached) - min(reached) + 1
    here = len({f // features for f in reached})
    return here < parts and span <= parts * features // 2


def part_after_part(seen: Mapping[int, Reached], parts: int, features: int) -> dict[int, Reached] | None:
    """Input feature -> outputs it is made of, numbered as if each part were contiguous; None if no unit is so wide that
    it holds them."""
    for width in _divisors(features):
        rows = parts * width
        if all(r // rows == f // width for f, reached in seen.items() for r in reached):
            return {
                f: frozenset(r % rows // width * features + r // rows * width + r % width for r in reached)
                for f, reached in seen.items()
            }
    return None


def one_for_each_head(seen: Mapping[int, Reached], group: int, outputs: int) -> dict[int, Reached] | None:
    """Input feature -> outputs it is made of, of a layer that `group` neighbouring heads share, numbered as if each
    had one; None if no head is wide enough to hold them."""
    for width in _divisors(outputs):
        if all(r // width == f // (group * width) for f, reached in seen.items() for r in reached):
            return {
                f: frozenset(f // width * width + r % width for r in reached) for f, reached in seen.items()
            }
    return None


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
