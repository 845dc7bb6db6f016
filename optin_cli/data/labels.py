"""Labels that a loss can be computed with: of the right kind, none missing, more than one value.

`where` names the data in errors; every check raises `InputError`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from optin_cli.data.batches import IGNORE
from optin_cli.errors import InputError

HIDDEN = -1
"""What GLUE's test splits hold instead of labels."""


def number_labels(labels: Sequence[Any], where: str) -> list[float]:
    """Labels as numbers; at least two values among them."""
    _check_numbers(labels, where)
    _check_varied(labels, where)
    return [float(value) for value in labels]


def class_labels(labels: Sequence[Any], classes: int, where: str) -> list[int]:
    """Labels as class numbers below `classes`; at least two classes among them."""
    _check_classes(labels, classes, where)
    _check_varied(labels, where)
    return [int(value) for value in labels]


def token_labels(labels: Sequence[Any], classes: int, where: str) -> list[list[int]]:
    """One list of class numbers a row, `IGNORE` where no word begins; at least two classes among them."""
    if odd := [value for value in labels if not isinstance(value, list)]:
        raise InputError(
            f"{where} has the label {str(odd[0])[:40]!r}, but a tagger needs one label for each word",
            "give a column of lists of words with --text and one of lists of tags with --label",
        )
    found = [value for row in labels for value in row if value != IGNORE]
    _check_classes(found, classes, where)
    _check_varied(found, where)
    return [[int(value) for value in row] for row in labels]


def _check_numbers(labels: Sequence[Any], where: str) -> None:
    for value in labels:
        if value is None or value != value:  # NaN is how tables say that there is none
            raise InputError(
                f"{where} has a row without a label", "fill the column, or name another with --label"
            )
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(
                f"{where} has the label {str(value)[:40]!r} where a number is needed",
                "name another column with --label",
            )


def _check_classes(labels: Sequence[Any], classes: int, where: str) -> None:
    _check_numbers(labels, where)
    for value in labels:
        if value == HIDDEN:
            raise InputError(
                f"{where} has hidden labels ({HIDDEN})", "choose a split with labels, such as train"
            )
        if value != int(value):
            raise InputError(
                f"{where} has the label {value:g}, but the model has classes, so labels are whole numbers",
                "name another column with --label",
            )
        if not 0 <= value < classes:
            raise InputError(
                f"{where} has the label {value:g}, but the model has classes 0..{classes - 1}",
                "check that the model was trained on these labels",
            )


def _check_varied(labels: Sequence[Any], where: str) -> None:
    if len(set(labels)) < 2:
        only = f"only the label {labels[0]:g}" if labels else "no label at all"
        raise InputError(
            f"the sampled rows of {where} have {only}: the loss on one class says nothing about the others",
            "sample more rows (--samples), or a split or file with all classes",
        )
