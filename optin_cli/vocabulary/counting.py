"""How often data has each token: of whole texts, as the model's task reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from optin_cli.data.batches import IGNORE, Batches
from optin_cli.data.examples import Examples
from optin_cli.data.readers import Encoded, lines
from optin_cli.loading.processors import TextProcessor

Progress = Callable[[float, float, str], None]
_CHUNK = 1000
"""Rows that are in memory as tokens at once."""
_UNCUT = 1 << 40
"""Tokens that no text has: what a model would cut off is counted, too."""


def count_tokens(batches: Batches, on_progress: Progress) -> Counter[int]:
    """Id -> how often the texts have it, special tokens included."""
    found: Counter[int] = Counter()
    if batches.processor is None:  # the caller's own tensors
        _add(found, batches.encoded)
        return found
    assert isinstance(batches.processor, TextProcessor)
    processor = replace(batches.processor, max_length=_UNCUT)
    examples = batches.examples
    for start, rows in _chunks(examples):
        _add(found, batches.reader.encode(rows, examples.columns, processor, _UNCUT))
        on_progress(start + len(rows), len(examples.rows), "counting tokens")
    return found


def texts_of(examples: Examples, most: int) -> Iterator[list[str]]:
    """The texts of at most so many rows, some at a time; nothing of tensors."""
    for start, rows in _chunks(examples):
        if start >= most:
            return
        for name in examples.columns.text:
            yield [text for text in lines(rows[name][: most - start]) if text]


def _chunks(examples: Examples) -> Iterator[tuple[int, Any]]:
    for start in range(0, len(examples.rows), _CHUNK):
        yield start, examples.rows.select(range(start, min(start + _CHUNK, len(examples.rows))))


def _add(found: Counter[int], encoded: Encoded) -> None:
    """Count the tokens of examples: what is read, and what is to be written or was hidden."""
    for row in encoded.inputs:
        found.update(row["input_ids"])
    for labels in encoded.details:
        if isinstance(labels, list):
            found.update(label for label in labels if label != IGNORE)
