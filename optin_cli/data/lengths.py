"""The lengths of texts in tokens: those a model was calibrated on, what it takes, and those it is measured on."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from optin_cli.artefacts.facts import LengthFacts, PruningStep

if TYPE_CHECKING:
    from optin_cli.data.batches import Batches

log = logging.getLogger("optin")


def text_lengths(batches: Batches, positions: int | None) -> LengthFacts | None:
    """The lengths of all texts; None for data without any.

    The model takes what the batches' processor says, or for batches that the caller made as many tokens as it has
    `positions`, if that is known.
    """
    counts = token_counts(batches)
    if not counts:
        return None
    return {
        "shortest": min(counts),
        "median": float(np.median(counts)),
        "longest": max(counts),
        "takes": getattr(batches.processor, "max_length", positions),
    }


def token_counts(batches: Batches) -> list[int]:
    """Tokens of each text, special ones included; empty for other data."""
    if batches.examples.columns.stored:
        return []
    return [len(row["input_ids"]) for row in batches.encoded.inputs if "input_ids" in row]


def warn_if_short(seen: LengthFacts | None, what: str) -> None:
    """Warn where texts are shorter than what the model takes. `what` was done on them."""
    if seen is not None and seen["takes"] is not None and seen["longest"] < seen["takes"]:
        log.warning(
            "%s on texts of at most %d tokens, and the model takes %d: on longer ones it may be worse",
            what,
            seen["longest"],
            seen["takes"],
        )


def describe(seen: LengthFacts) -> str:
    """`9 to 64 tokens, median 21`"""
    return f"{seen['shortest']} to {seen['longest']} tokens, median {seen['median']:.0f}"


def longest_seen(step: PruningStep) -> int | None:
    """The longest text that a pruned model saw in its last step: refitted on it, or else scored. None if not known."""
    seen = step.get("lengths")
    facts = (seen["refitted"] or seen["scored"]) if seen else None
    return facts and facts["longest"]
