"""Named entities in tags, and their F1, as CoNLL's `conlleval` counts them (Tjong Kim Sang & De Meulder 2003)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_TAG = re.compile(r"O|[BIESULM](-.+)?")
_ENDING, _INSIDE = "ESUL", "IELM"

Entity = tuple[str, int, int]
"""(type, first tag, the one behind the last)"""


def are_tags(names: Iterable[str]) -> bool:
    """Whether classes are tags of IOB1, IOB2, IOBES or BILOU: O, B-PER, I-PER, ..."""
    names = list(names)
    return len(names) > 1 and "O" in names and all(_TAG.fullmatch(name) for name in names)


def entities(tags: Sequence[str]) -> set[Entity]:
    """The entities of a sentence. One begins at B, S or U, behind the end of another, and where the type changes."""
    found: set[Entity] = set()
    current, start, before = None, 0, "O"
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, kind = tag.partition("-")
        goes_on = current == kind and prefix in _INSIDE and before not in _ENDING
        if not goes_on:
            if current is not None:
                found.add((current, start, place))
            current, start = (None if prefix == "O" else kind), place
        before = prefix
    return found


def entity_f1(predicted: Sequence[Sequence[str]], truth: Sequence[Sequence[str]]) -> dict[str, float]:
    """`entity_f1`, `entity_precision` and `entity_recall` over all sentences, in points; 0 where there are none."""
    right = ours = theirs = 0
    for guess, tags in zip(predicted, truth, strict=True):
        mine, wanted = entities(guess), entities(tags)
        right, ours, theirs = right + len(mine & wanted), ours + len(mine), theirs + len(wanted)
    return {
        "entity_f1": 200 * right / max(1, ours + theirs),
        "entity_precision": 100 * right / max(1, ours),
        "entity_recall": 100 * right / max(1, theirs),
    }
