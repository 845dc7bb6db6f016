"""Batches of text with further examples: texts of the same rows, joined to the longest sequences a model takes.

What is fitted on short texts alone has seen the first positions alone, and may give anything at later ones. The dense
model answers joined texts as it answers any, so they serve as well where nothing is labelled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from optin_cli.data.batches import Batches
from optin_cli.data.readers import Encoded

LONGEST = 512
"""Tokens of a joined text at most, however long a sequence the model takes."""


def cover_positions(batches: Batches, share: float, apart: Callable[[int], Any], seed: int = 0) -> Batches:
    """The batches, with joined texts where there are texts and the model takes longer ones than the longest of them.

    `share`, `apart` and `seed` are those of `PackedBatches`. Batches that the caller made stay as they are, and so do
    windows, of which the reader decides how long they are.
    """
    columns = batches.examples.columns
    if not share or batches.processor is None or columns.stored or batches.reader.windows:
        return batches
    length = min(batches.processor.max_length, LONGEST)
    longest = max(len(row["input_ids"]) for row in batches.encoded.inputs)
    return batches if longest >= length else PackedBatches(batches, share, length, apart, seed)


class PackedBatches(Batches):
    """`batches` of text, with joined examples behind their own ones and in batches of no more tokens than those have.

    Joined examples have `share` times the tokens of the others, and `length` tokens each, so that the last one may be
    more than that share. Only rows that `apart` gives the same value are joined to one another: it is asked with a
    row's position in the sample. `seed` draws which rows are joined.
    """

    def __init__(
        self, batches: Batches, share: float, length: int, apart: Callable[[int], Any], seed: int = 0
    ) -> None:
        super().__init__(
            batches.examples,
            batches.processor,
            batches.batch_size,
            max_length=batches.max_length,
            reader=batches.reader,
            together=batches.together,
            shuffle=batches.shuffle,
        )
        self.plain = batches
        self.share = share
        self.length = length
        self.apart = apart
        self.seed = seed

    @cached_property
    def encoded(self) -> Encoded:
        """The examples of the rows, and behind them the joined ones; each of those is of its first row."""
        own = self.plain.encoded
        joined, rows = self._joined(own)
        # a joined example has no details: labels are of the others
        return Encoded([*own.inputs, *joined], [*own.rows, *rows], own.details)

    def _joined(self, own: Encoded) -> tuple[list[dict[str, list[int]]], list[int]]:
        groups = self._groups(own)
        columns, source = self.examples.columns, self.examples.rows
        texts = {name: source[name][:] for name in columns.text}
        rows = {
            name: [_join([column[row] for row in group]) for group in groups]
            for name, column in texts.items()
        }
        found = self.reader.encode(rows, columns, self.processor, self.length)
        return found.inputs, [groups[row][0] for row in found.rows]

    def _groups(self, own: Encoded) -> list[list[int]]:
        """Rows to be joined: those that are apart from each other in groups of their own."""
        tokens: dict[int, int] = {}
        for row, inputs in zip(own.rows, own.inputs, strict=True):
            # about two of them are special, and not repeated in a joined text; what is too long is cut
            tokens[row] = max(tokens.get(row, 1), len(inputs["input_ids"]) - 2)
        order = np.random.default_rng(self.seed).permutation(sorted(tokens)).tolist()
        kinds = dict.fromkeys(self.apart(row) for row in sorted(tokens))
        return [
            group
            for kind in kinds
            for group in self._cut([row for row in order if self.apart(row) == kind], tokens)
        ]

    def _cut(self, order: Sequence[int], tokens: dict[int, int]) -> Iterator[list[int]]:
        """Runs of rows of `length` tokens each, until they have the share of all these rows' tokens."""
        wanted = self.share * sum(tokens[row] for row in order)
        group: list[int] = []
        size = done = 0
        for row in order:
            if done >= wanted:
                return
            group.append(row)
            size += tokens[row]
            if size >= self.length:
                yield group
                done += min(size, self.length)
                group, size = [], 0
        if group and not done:
            yield group  # all there is

    @cached_property
    def _ids(self) -> list[list[int]]:
        """The batches of the rows' own examples, then those of the joined ones."""
        own = self.plain._ids
        first = sum(map(len, own))
        longest = max((len(row["input_ids"]) for row in self.plain.encoded.inputs), default=1)
        step = max(1, self.batch_size * longest // self.length)
        joined = range(first, len(self.encoded.inputs))
        return [*own, *(list(joined[start : start + step]) for start in range(0, len(joined), step))]


def _join(texts: Sequence[Any]) -> Any:
    """Texts with a space between each two; lists of words as one list."""
    if any(isinstance(text, list) for text in texts):
        return [word for text in texts for word in text or ()]
    return " ".join("" if text is None else str(text) for text in texts)
