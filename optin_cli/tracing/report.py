"""Reasons for what is left out, in few lines."""

from __future__ import annotations

import re
from collections.abc import Sequence

from optin_cli.tracing.blocks import Blocks
from optin_cli.tracing.sites import LeftOut, common_parent

SHOWN = 4  # reasons in an error


def alike(path: str) -> str:
    """A path with a star for every number."""
    return re.sub(r"\d+", "*", path)


def first_reasons(left: Sequence[LeftOut]) -> str:
    """The first few reasons, of layers within one of several alike modules."""
    reasons: dict[tuple[str, str], str] = {}
    for gone in left:
        home = common_parent(gone.layers) if gone.layers else gone.where
        if re.search(r"\d", home):
            reasons.setdefault((alike(gone.where), alike(gone.why)), gone.why.replace(f"{home}.", ""))
    return "".join(f"; {where}: {why}" for (where, _), why in list(reasons.items())[:SHOWN])


def merged(left: Sequence[LeftOut], blocks: Blocks) -> list[LeftOut]:
    """One line for what is alike in many blocks, named from the block."""
    lines: dict[tuple[str, str], list[int]] = {}
    for gone in left:
        block = blocks.of(gone.where)
        where = gone.where.removeprefix(f"{block}.") if block else gone.where
        why = gone.why.replace(f"{block}.", "") if block else gone.why
        lines.setdefault((where, why), []).append(blocks.paths.index(block) if block else -1)
    reasons = []
    for (where, why), indices in lines.items():
        numbers = sorted({i for i in indices if i >= 0})
        several = "all blocks" if len(numbers) == len(blocks.paths) else f"blocks {_spans(numbers)}"
        reasons.append(LeftOut(f"{where} ({several})" if numbers else where, why))
    return reasons


def _spans(numbers: Sequence[int]) -> str:
    """`0-3,5`"""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    return ",".join("-".join(map(str, span)) for span in spans)
