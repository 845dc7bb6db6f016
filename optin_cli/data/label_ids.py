"""Map the labels that a data set stores to the numbers that a model gives its classes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from optin_cli.errors import InputError, param


def class_names(feature: Any) -> list[str]:
    """Names of a ClassLabel feature or of a list of them; none for anything else."""
    inner = getattr(feature, "feature", feature)
    return list(getattr(inner, "names", None) or [])


def numbering(
    values: Sequence[Any], feature: Any, label2id: Mapping[str, int], spec: str
) -> Callable[[Any], Any]:
    """A function from a stored label to the model's number: by name wherever both sides have names.

    `values` are all stored labels, perhaps lists of them. Case doesn't matter unless names differ by it alone. Class
    numbers stay as they are where the model knows none of the data's names (LABEL_0). Raises `InputError` for names
    that the model does not know.
    """
    known = _known(label2id)
    flat = [v for value in values for v in (value if isinstance(value, list) else [value])]
    flat = [v for v in flat if v is not None and v != ""]
    names = class_names(feature)
    if names and any(known(name) is not None for name in names):
        used = {names[v] for v in flat if isinstance(v, int) and v >= 0}
        if unknown := sorted(name for name in used if known(name) is None):
            raise _unknown(unknown, label2id, spec)
        return lambda value: value if value is None or value < 0 else known(names[value])
    if not any(isinstance(v, str) for v in flat):
        return lambda value: value
    unknown = sorted({str(v) for v in flat if known(v) is None})
    if not unknown:
        return lambda value: None if value is None else known(value)
    if not _numbers(flat):
        raise _unknown(unknown, label2id, spec)
    return lambda value: None if value is None or value == "" else float(value)


def _known(label2id: Mapping[str, int]) -> Callable[[Any], int | None]:
    """A label's number by its name; None for an unknown one."""
    folded = {name.casefold(): number for name, number in label2id.items()}
    if len(folded) < len(label2id):
        return lambda name: label2id.get(name)
    return lambda name: folded.get(str(name).casefold())


def _numbers(values: Iterable[Any]) -> bool:
    try:
        for value in values:
            float(value)
    except (TypeError, ValueError):
        return False
    return True


def _unknown(names: Sequence[str], label2id: Mapping[str, int], spec: str) -> InputError:
    return InputError(
        f"labels {', '.join(map(repr, names[:3]))} of {spec} are not among the model's: "
        f"{', '.join(label2id) or 'none named'}",
        f"check that the model was trained on these labels, or name another column with {param('label')}",
    )
