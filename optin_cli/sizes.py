"""Numbers as people give them: sizes as `60MiB`, and what no setting may be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from optin_cli.errors import UsageError, param

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def byte_count(given: int | str, name: str) -> int:
    """`4GiB`, `500MB`, `1e9` -> bytes; a number is bytes already. `name` is the parameter's. Raises `UsageError`."""
    if isinstance(given, int):
        return given
    way_out = f"write {param(name, meta='4GiB')} or {param(name, meta='500MB')}"
    return int(parse_size(given, param(name), "", way_out))


def parse_size(text: str, option: str, unit: str, way_out: str) -> float:
    """Bytes of a size that is counted in `unit` where it names none itself. Raises `UsageError` with the `way_out`."""
    number = text.strip().rstrip("BbGgIiKkMm")
    try:
        count = float(number) * _UNITS[(text.strip()[len(number) :] or unit).lower()]
    except (ValueError, KeyError) as error:
        raise UsageError(f"{option} {text!r} is not a size", way_out) from error
    if not 0 <= count < float("inf"):
        raise UsageError(f"{option} {text!r} is not a size", way_out)
    return count


def check_numbers(settings: type, values: Mapping[str, Any]) -> None:
    """Raise `UsageError` for the first number among `values` that no field of `settings` may be.

    A number is finite, and at least what the field's metadata has as `least`.
    """
    for field in fields(settings):
        value, least = values.get(field.name), field.metadata.get("least")
        check_finite(field.name, value)
        if least is not None and value is not None and value < least:
            raise UsageError(f"{param(field.name, value)}: at least {least} is needed")


def check_finite(name: str, value: Any) -> None:
    """Raise `UsageError` for a parameter's value that is NaN or infinite."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{param(name, value)} is not a finite number")
