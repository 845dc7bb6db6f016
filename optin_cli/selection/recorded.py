"""The options of `optin select` that a mask was made with, from what it records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optin_cli.selection.budgets import budget_kinds

_SELECTED = {
    "min_heads": "min-heads", "min_neurons": "min-neurons", "min_channels": "min-channels",
    "max_prune": "max-prune-per-layer", "only": "only", "round_to": "round-to", "interactions": "interactions",
    "relative_to": "relative-to",
}  # fmt: skip
_UNASKED = {
    "min_heads": 0, "min_neurons": 0, "min_channels": 0, "max_prune": 1.0, "only": None, "round_to": "auto",
    "interactions": "none", "relative_to": "dense",
}  # fmt: skip


def select_options(asked: Mapping[str, Any]) -> list[str]:
    """`--flops 0.6 --uniform`, from a mask's `budget`."""
    words = []
    for option, kind in budget_kinds().items():
        for one in kind.recorded(asked):
            words += [option, f"{one.amount:g}{'ms' if one.key.endswith('_ms') else ''}"]
    words += other_options(asked, _SELECTED, _UNASKED)
    return [*words, "--uniform"] if asked.get("uniform") else words


def other_options(
    settings: Mapping[str, Any], names: Mapping[str, str], defaults: Mapping[str, Any]
) -> list[str]:
    """The options of those settings that are not at their defaults; `names` has the name of each, without dashes."""
    words = []
    for name, option in names.items():
        value = settings.get(name, defaults[name])
        if value is not None and value != defaults[name]:
            words += [f"--{option}", f"{value:g}" if isinstance(value, float) else str(value)]
    return words
