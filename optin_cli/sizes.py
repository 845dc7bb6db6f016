"""Sizes as people write them: `60MiB`, `1.5GB`."""

from __future__ import annotations

from optin_cli.errors import UsageError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_size(text: str, option: str, unit: str, way_out: str) -> float:
    """Bytes of a size that is counted in `unit` where it names none itself. Raises `UsageError` with the `way_out`."""
    number = text.strip().rstrip("BbGgIiKkMm")
    try:
        count = float(number) * _UNITS[(text.strip()[len(number) :] or unit).lower()]
    except (ValueError, KeyError) as error:
        raise UsageError(f"{option} {text!r} is no size", way_out) from error
    if not 0 <= count < float("inf"):
        raise UsageError(f"{option} {text!r} is no size", way_out)
    return count
