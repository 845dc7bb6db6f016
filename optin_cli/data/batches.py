"""Examples -> batches of model inputs. Text is grouped by length, so that padding stays small."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from optin_cli.data.encoded_files import BrokenFile
from optin_cli.data.examples import Examples
from optin_cli.data.kinds import kind_of
from optin_cli.data.label_ids import numbering
from optin_cli.data.readers import ROWS, Encoded, Reader, Window
from optin_cli.data.workers import in_order, worker_count
from optin_cli.errors import InputError

IGNORE = -100
MASK = "attention_mask"
DECODER = "decoder_"
"""Begins the names of what a decoder reads."""


class TextEncoder(Protocol):
    """The part of a tokenizer (`loading.processors.TextProcessor`) that batches need."""

    def tokenize(
        self, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int | None
    ) -> list[dict[str, list[int]]]: ...
    def tokenize_words(self, words: Sequence[str], max_length: int | None) -> tuple[dict, list]: ...
    def windows(
        self, questions: Sequence[str], contexts: Sequence[str], max_length: int
    ) -> Iterator[tuple[int, dict[str, list[int]], Window]]: ...
    def running_text(self, texts: Sequence[str], max_length: int) -> list[dict[str, list[int]]]: ...
    def masked(
        self, rows: Sequence[dict[str, list[int]]]
    ) -> tuple[list[dict[str, list[int]]], list[list[int]]]: ...
    def with_targets(
        self, texts: Sequence[str], targets: Sequence[str], max_length: int | None
    ) -> tuple[list[dict[str, list[int]]], list[list[int]]]: ...
    def pad(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]: ...


@dataclass
class Batch:
    """One batch on one device."""

    inputs: dict[str, Tensor]
    """Keyword arguments of the model."""
    valid: Tensor | None
    """[batch, tokens] True for real tokens; None when there is no padding (images, spectrograms)."""
    example_ids: list[int]
    """Position of each item among all examples, so that outputs can be put back in order."""

    def __len__(self) -> int:
        return len(self.example_ids)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Batch:
        """Move to a device; floating inputs (pixels, spectrograms) also to `dtype`."""
        inputs = {
            k: v.to(device, dtype) if dtype is not None and v.is_floating_point() else v.to(device)
            for k, v in self.inputs.items()
        }
        return Batch(inputs, None if self.valid is None else self.valid.to(device), self.example_ids)

    def repeated(self, times: int) -> Batch:
        """So many copies of the batch, one behind the other."""
        if times == 1:
            return self
        inputs = {k: v.repeat(times, *[1] * (v.dim() - 1)) for k, v in self.inputs.items()}
        valid = None if self.valid is None else self.valid.repeat(times, 1)
        return Batch(inputs, valid, self.example_ids * times)

    @property
    def slots(self) -> int:
        """Places for tokens, padding included; an image counts as one, a recording as its transcript."""
        return len(self) * self._width if self.valid is None else self.valid.numel()

    @property
    def _width(self) -> int:
        """Slots of an example without padding in what the first block reads."""
        return max((mask.shape[1] for name, mask in self.inputs.items() if name.endswith(MASK)), default=1)

    def split(self, overhead: int, most: int | None = None) -> list[Batch]:
        """The batch as runs of consecutive examples, each cut to its longest: the split with the fewest token slots.

        A run counts `overhead` slots more: what a call costs before it computes anything. It has at most `most`
        slots, or one example. Images, and text that is padded on the left, where a cut would move the positions,
        stay whole within that bound.
        """
        if self.valid is None:
            lengths = [self._width] * len(self)
        elif not bool(self.valid[:, 0].all()):
            lengths = [self.valid.shape[1]] * len(self)
        else:
            slots = torch.arange(1, self.valid.shape[1] + 1, device=self.valid.device)
            lengths = (self.valid * slots).amax(1).tolist()
        return [self._run(start, stop, lengths) for start, stop in _runs(lengths, overhead, most)]

    def head(self, count: int) -> Batch:
        """The first `count` examples, as wide as the batch is."""
        valid = None if self.valid is None else self.valid[:count]
        return Batch({k: v[:count] for k, v in self.inputs.items()}, valid, self.example_ids[:count])

    def real(self, mask: str) -> Tensor | None:
        """[batch, tokens] True for what the input called `mask` marks as real; None when there is no padding."""
        found = self.inputs.get(mask)
        return self.valid if found is None or mask == MASK else found.bool()

    def _run(self, start: int, stop: int, lengths: Sequence[int]) -> Batch:
        ids = self.example_ids[start:stop]
        if self.valid is None:
            return Batch({k: v[start:stop] for k, v in self.inputs.items()}, None, ids)
        longest = {MASK: max(lengths[start:stop])}
        for name, mask in self.inputs.items():  # a decoder's inputs have other lengths
            if name.endswith(MASK) and name != MASK:
                longest[name] = (
                    max(1, int(mask[start:stop].any(0).sum())) if bool(mask[:, 0].all()) else mask.shape[1]
                )
        inputs = {k: v[start:stop, : longest[_mask_of(k, longest)]] for k, v in self.inputs.items()}
        return Batch(inputs, self.valid[start:stop, : longest[MASK]], ids)


def _mask_of(name: str, masks: Iterable[str]) -> str:
    """The mask of an input, by the longest beginning they share: `decoder_input_ids` has `decoder_attention_mask`."""
    return max((m for m in masks if name.startswith(m.removesuffix(MASK))), key=len)


def _runs(lengths: Sequence[int], overhead: int, most: int | None) -> list[tuple[int, int]]:
    """Cut points of the cheapest split into runs, a run costing (its longest) * (its examples) + overhead."""
    best, cut = [0.0], [0]
    for stop in range(1, len(lengths) + 1):
        longest = 0
        options: list[tuple[float, int]] = []
        for start in range(stop - 1, -1, -1):
            longest = max(longest, lengths[start])
            slots = longest * (stop - start)
            if most is not None and slots > most and options:
                break
            options.append((best[start] + slots + overhead, start))
        cost, start = min(options)
        best.append(cost)
        cut.append(start)
    runs, stop = [], len(lengths)
    while stop:
        runs.append((cut[stop], stop))
        stop = cut[stop]
    return runs[::-1]


class Batches:
    """A fixed sequence of batches: item i is the same at every pass.

    `reader` makes the examples. `together` keeps the sides of a row in one batch. `shuffle` is a seed that draws
    which examples share a batch; without it those of one length do.
    """

    def __init__(
        self,
        examples: Examples,
        processor: Any,
        batch_size: int,
        *,
        max_length: int | None = None,
        reader: Reader = ROWS,
        together: bool = False,
        shuffle: int | None = None,
    ) -> None:
        self.examples = examples
        self.processor = processor
        self.batch_size = batch_size
        self.max_length = max_length
        self.reader = reader
        self.separate = reader.sides(examples.columns) == 2
        """Each row is two examples."""
        self.together = together and self.separate
        self.shuffle = shuffle

    @cached_property
    def encoded(self) -> Encoded:
        """Every text example, by its id."""
        return self.reader.encode(self.examples.rows, self.examples.columns, self.processor, self.max_length)

    @cached_property
    def rows(self) -> list[int]:
        """The row of each example, by its position in the sample."""
        return list(range(len(self.examples.rows))) if self.examples.columns.stored else self.encoded.rows

    @cached_property
    def _ids(self) -> list[list[int]]:
        """The example ids of every batch, the shortest text of each first; files as they come."""
        if self.examples.columns.stored:
            lengths = [0] * len(self.examples.rows)
        else:
            lengths = [len(row["input_ids"]) for row in self.encoded.inputs]
        size = 2 if self.together else 1
        groups = [list(range(first, first + size)) for first in range(0, len(lengths), size)]
        if self.shuffle is None:
            groups.sort(key=lambda group: max(lengths[i] for i in group))
        else:
            groups = [groups[i] for i in np.random.default_rng(self.shuffle).permutation(len(groups))]
        step = max(1, self.batch_size // size)
        batches = [groups[start : start + step] for start in range(0, len(groups), step)]
        return [sorted((i for group in batch for i in group), key=lengths.__getitem__) for batch in batches]

    @property
    def order(self) -> list[int]:
        """Example ids in batch order: shortest text first, unless drawn; files as they come."""
        return [i for ids in self._ids for i in ids]

    @property
    def count(self) -> int:
        """Number of examples."""
        return sum(map(len, self._ids))

    def part(self, index: int, count: int) -> Batches:
        """Of batch `index` `count` rows, evenly spaced, as the only batch; example ids stay what they are."""
        size = 2 if self.together else 1
        rows = list(dict.fromkeys(i // size for i in self.ids(index)))
        count = min(count, len(rows))
        chosen = {rows[(2 * k + 1) * len(rows) // (2 * count)] for k in range(count)}
        part = copy(self)
        part._ids = [[i for i in self.ids(index) if i // size in chosen]]
        return part

    def read_by(self, processor: Any) -> Batches:
        """The same examples in the same batches, read by the tokenizer of another model."""
        other = copy(self)
        vars(other).pop("encoded", None)
        other.processor, other._ids = processor, self._ids
        return other

    def tokens(self, index: int) -> int:
        """Tokens of a batch, padding out; of files the number of them."""
        ids = self.ids(index)
        return len(ids) if self.pictured else sum(len(self.encoded.inputs[i]["input_ids"]) for i in ids)

    def __len__(self) -> int:
        return len(self._ids)

    def ids(self, index: int) -> list[int]:
        """The example ids of a batch, without making it."""
        return self._ids[index]

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        ids = self.ids(index)
        if self.examples.columns.stored:
            # here, in no worker: what asks for batches one by one computes much longer on each than it decodes
            return self._stored_batch(ids, self._decoded(index))
        inputs = self.processor.pad([self.encoded.inputs[i] for i in ids])
        return Batch(inputs, inputs[MASK].bool(), ids)

    def __iter__(self) -> Iterator[Batch]:
        """All batches; files are decoded ahead, in workers of which the results are independent."""
        if not self.examples.columns.stored:
            return (self[index] for index in range(len(self)))
        workers = worker_count(self.examples.data.workers, self.count)
        decoded = in_order(self._decoded, len(self), workers)
        return (self._stored_batch(self.ids(index), found) for index, found in enumerate(decoded))

    def _decoded(self, index: int) -> np.ndarray:
        """The transformed files of a batch: (images, 3, h, w), (recordings, bins, frames)."""
        return torch.stack([self.stored_example(i) for i in self.ids(index)]).numpy()

    @property
    def pictured(self) -> bool:
        """Whether `stored_example` gives images or spectrograms."""
        return bool(self.examples.columns.stored)

    def stored_example(self, example: int) -> Tensor:
        """A transformed file: (3, h, w), (bins, frames). Raises `InputError` for one that can't be used."""
        column, kind = self.examples.columns.stored, kind_of(self.examples.columns)
        try:
            return self.processor(kind.decode(self.examples.rows[example][column]))
        except (BrokenFile, OSError, ValueError) as error:
            row = self.examples.row_ids[example]
            raise InputError(
                f"{self.examples.data.spec}: the {kind.name} in row {row} can't be used: {error}"
            ) from error

    def _stored_batch(self, ids: list[int], decoded: np.ndarray) -> Batch:
        inputs = {self.processor.input_name: torch.from_numpy(decoded)}
        if self.examples.columns.text:
            inputs |= self.processor.pad([self.encoded.inputs[i] for i in ids])
        return Batch(inputs, None, ids)

    def labels(self, label2id: dict[str, int] | None = None) -> list[Any] | None:
        """The label of every row (not example), as numbers; None without a label column.

        Word labels become one list a row, aligned to tokens (first sub-word; `IGNORE` elsewhere).
        """
        columns, rows = self.examples.columns, self.examples.rows
        if columns.label is None:
            return None
        values = rows[columns.label][:]
        number = numbering(values, rows.features[columns.label], label2id or {}, self.examples.data.spec)
        if columns.words:
            return [
                self._align(words, [number(tag) for tag in tags], row)
                for words, tags, row in zip(
                    rows[columns.text[0]][:], values, self.examples.row_ids, strict=True
                )
            ]
        return [number(value) for value in values]

    def _align(self, words: list[str], tags: list[Any], row: int) -> list[Any]:
        """The tag of each token: its word's at the first sub-word, `IGNORE` elsewhere."""
        if len(words) != len(tags):
            raise InputError(
                f"{self.examples.data.spec}: row {row} has {len(words)} words but {len(tags)} labels"
            )
        aligned, previous = [], None
        for word in self.processor.tokenize_words(words, self.max_length)[1]:
            aligned.append(IGNORE if word is None or word == previous else tags[word])
            previous = word
        return aligned
