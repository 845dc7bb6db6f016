"""Labels that a metric or a loss can be computed with: of the right kind, none missing or hidden.

`where` names the data in errors; every check raises `InputError`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from optin_cli.data.batches import IGNORE
from optin_cli.data.glue import HIDDEN
from optin_cli.errors import InputError, param


def number_labels(labels: Sequence[Any], where: str) -> list[float]:
    """Labels as numbers; not all of them hidden."""
    for value in labels:
        if isinstance(value, int | float) and math.isfinite(value):
            continue
        missing = value is None or value != value  # NaN is how tables say that there is none
        what = "a row without a label" if missing else f"the label {str(value)[:40]!r}"
        raise InputError(
            f"{where} has {what} where a number is needed",
            f"fill the column, or name another with {param('label')}",
        )
    if labels and all(value == HIDDEN for value in labels):
        raise _hidden(where, len(labels), len(labels))
    return [float(value) for value in labels]


def class_labels(labels: Sequence[Any], where: str) -> list[int]:
    """Labels as class numbers; none of them hidden. `check_range` says whether a model has the classes."""
    numbers = number_labels(labels, where)
    if odd := [value for value in numbers if value != int(value)]:
        raise InputError(
            f"{where} has the label {odd[0]:g}, but the model has classes, so labels are whole numbers",
            f"name another column with {param('label')}",
        )
    if hidden := sum(value == HIDDEN for value in numbers):
        raise _hidden(where, hidden, len(numbers))
    return [int(value) for value in numbers]


def token_labels(labels: Sequence[Any], where: str) -> list[list[int]]:
    """One list of class numbers a row, `IGNORE` where no word begins."""
    if odd := [value for value in labels if not isinstance(value, list)]:
        raise InputError(
            f"{where} has the label {str(odd[0])[:40]!r}, but a tagger needs one label for each word",
            f"give a column of lists of words with {param('text')} and one of lists of tags with {param('label')}",
        )
    return [class_labels(row, where) for row in labels]


def ordered_columns(columns: Sequence[str], label2id: Mapping[str, int], count: int) -> list[str]:
    """A column for each of a model's `count` labels, by the model's names; as given where it names none of them so."""
    if len(columns) != count:
        names = f": {','.join(sorted(label2id, key=label2id.__getitem__))}" if len(label2id) == count else ""
        raise InputError(
            f"{len(columns)} label columns were given, but the model has {count} labels",
            f"give {param('label')} a column for each{names}",
        )
    return sorted(columns, key=label2id.__getitem__) if set(columns) == set(label2id) else list(columns)


def check_range(labels: Sequence[Any], classes: int, where: str) -> None:
    """Refuse a class number that the model does not have. Takes flat labels, or lists of them with `IGNORE`."""
    if outside := [value for value in _flat(labels) if not 0 <= value < classes]:
        raise InputError(
            f"{where} has the label {outside[0]}, but the model has classes 0..{classes - 1}",
            "check that the model was trained on these labels",
        )


def check_varied(labels: Sequence[Any], where: str) -> None:
    """Refuse labels without two values among them. Takes flat labels, or lists of them with `IGNORE`."""
    values = _flat(labels)
    if len(set(values)) < 2:
        only = f"only the label {values[0]:g}" if values else "no label at all"
        raise InputError(
            f"the sampled rows of {where} have {only}: the loss on one class says nothing about the others",
            f"sample more rows ({param('samples')}), or a split or file with all classes",
        )


def _flat(labels: Sequence[Any]) -> list[Any]:
    found: list[Any] = []
    for row in labels:
        found += [value for value in row if value != IGNORE] if isinstance(row, list) else [row]
    return found


def _hidden(where: str, hidden: int, total: int) -> InputError:
    return InputError(
        f"{hidden} of {total} labels of {where} are hidden ({HIDDEN})",
        "choose a split with labels, such as train or validation",
    )
