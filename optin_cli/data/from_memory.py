"""Batches of tensors that the caller made: from a DataLoader, or any other iterable.

They are read once, as far as examples are asked for, and kept: a generator can't be read again, and a DataLoader that
shuffles would give other batches at every pass. So every pass over them sees the same, as `Batches` promises.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from optin_cli.artefacts.files import digest_chunks
from optin_cli.data.batches import IGNORE, Batch, Batches
from optin_cli.data.columns import Columns
from optin_cli.data.examples import Examples
from optin_cli.data.readers import Encoded, Reader
from optin_cli.data.sources import DataSpec
from optin_cli.errors import InputError

_MASK = "attention_mask"
_TOKENS = "input_ids"
_LABELS = ("labels", "label", "targets", "target")
_WAY_OUT = "give batches that are tensors, dicts of tensors, or (inputs, labels)"

RawBatch = tuple[dict[str, Tensor], Any]
"""Inputs by name, on the CPU, and the labels of the examples or None."""


class BatchStore:
    """An iterable of batches, read no further than it must be; what was read is kept."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._left: Iterator[Any] = iter(batches)
        self._read: list[Any] = []

    def first(self, samples: int | None, names: Sequence[str]) -> list[RawBatch]:
        """Batches of `samples` examples together (all for None): fewer where there are no more.

        `names` are the arguments of the model: of a dict those are taken, a tensor alone is the first of them. Raises
        `InputError` for batches of anything else.
        """
        found: list[RawBatch] = []
        count, index = 0, 0
        while samples is None or count < samples:
            if index == len(self._read):
                batch = next(self._left, None)
                if batch is None:
                    break
                self._read.append(batch)
            inputs, labels = _parts(self._read[index], names)
            size = len(next(iter(inputs.values())))
            if samples is not None and count + size > samples:
                inputs = {name: tensor[: samples - count] for name, tensor in inputs.items()}
                labels = None if labels is None else labels[: samples - count]
            found.append((inputs, labels))
            count, index = count + size, index + 1
        if not count:
            raise InputError("the data holds no batch", "an iterator that was read before gives nothing more")
        return found


class HeldBatches(Batches):
    """The caller's batches, as they are but for the order: the shortest first, and within each the shortest too.

    Labels are those of the batches. `names` are the arguments of the model.
    """

    def __init__(self, data: DataSpec, samples: int | None, names: Sequence[str], reader: Reader) -> None:
        self._raw = data.held.first(samples, names)
        sizes = [len(next(iter(inputs.values()))) for inputs, _ in self._raw]
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        super().__init__(_examples(data, self._raw), None, max(sizes), reader=reader)
        ready = [_ready(inputs, start) for (inputs, _), start in zip(self._raw, starts, strict=True)]
        self._batches = sorted(ready, key=lambda batch: max(_lengths(batch)))

    @cached_property
    def encoded(self) -> Encoded:
        """The tokens of every example, padding out."""
        rows: dict[int, dict[str, list[int]]] = {}
        for batch in self._batches:
            real = batch.valid
            for row, example in enumerate(batch.example_ids):
                kept = slice(None) if real is None else real[row]
                rows[example] = {
                    name: tensor[row][kept].tolist()
                    for name, tensor in batch.inputs.items()
                    if tensor.dim() == 2 and (real is None or tensor.shape == real.shape)
                }
        return Encoded([rows[example] for example in sorted(rows)], list(range(len(rows))))

    @property
    def rows(self) -> list[int]:
        """Every example is a row."""
        return list(range(self.count))

    @property
    def _ids(self) -> list[list[int]]:
        return [batch.example_ids for batch in self._batches]

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._batches[index]

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)

    @property
    def pictured(self) -> bool:
        return any(tensor.dim() > 2 for tensor in self._batches[0].inputs.values())

    def stored_example(self, example: int) -> Tensor:
        """The first of its inputs that is an image or spectrogram."""
        batch = next(batch for batch in self._batches if example in batch.example_ids)
        pixels = next(tensor for tensor in batch.inputs.values() if tensor.dim() > 2)
        return pixels[batch.example_ids.index(example)]

    def labels(self, label2id: dict[str, int] | None = None) -> list[Any] | None:
        """The labels that came with the batches: a number an example, or one list for its tokens, `IGNORE` for some."""
        if self.examples.columns.label is None:
            return None
        found = self.examples.rows[self.examples.columns.label][:]
        if not isinstance(found[0], list):
            return found
        cut = [len(row["input_ids"]) for row in self.encoded.inputs] if IGNORE in found[0] else None
        return found if cut is None else [row[:length] for row, length in zip(found, cut, strict=True)]


def _parts(batch: Any, names: Sequence[str]) -> RawBatch:
    """(inputs, labels) of what a DataLoader gives."""
    labels = None
    if isinstance(batch, list | tuple):
        if len(batch) not in (1, 2):
            raise InputError(f"a batch of {len(batch)} parts: which are the inputs?", _WAY_OUT)
        batch, labels = (*batch, None)[:2]
    if isinstance(batch, Tensor):
        batch = {names[0]: batch}
    if not isinstance(batch, Mapping):
        raise InputError(f"a batch is a {type(batch).__name__}", _WAY_OUT)
    if labels is None:
        labels = next((batch[name] for name in _LABELS if name in batch), None)
    inputs = {
        name: value.detach().cpu()
        for name, value in batch.items()
        if isinstance(value, Tensor) and value.dim() and name in names and name not in _LABELS
    }
    if not inputs:
        raise InputError(
            f"a batch has {', '.join(map(str, batch)) or 'nothing'}, and the model takes {', '.join(names)}",
            "tokenize texts first, or give the Dataset itself instead of a DataLoader",
        )
    if labels is not None:
        labels = labels.detach().cpu() if isinstance(labels, Tensor) else torch.as_tensor(labels)
    return inputs, labels


def _ready(inputs: dict[str, Tensor], start: int) -> Batch:
    """A batch of examples numbered from `start`, the shortest first."""
    if _TOKENS in inputs and _MASK not in inputs:
        inputs = {**inputs, _MASK: torch.ones_like(inputs[_TOKENS])}
    size = len(next(iter(inputs.values())))
    valid = inputs[_MASK].bool() if _MASK in inputs else None
    batch = Batch(inputs, valid, list(range(start, start + size)))
    if valid is None:
        return batch
    order = torch.tensor(_lengths(batch)).argsort(stable=True)
    return replace(
        batch,
        inputs={name: tensor[order] for name, tensor in inputs.items()},
        valid=valid[order],
        example_ids=[start + i for i in order.tolist()],
    )


def _lengths(batch: Batch) -> list[int]:
    return [0] * len(batch) if batch.valid is None else batch.valid.sum(1).tolist()


def _examples(data: DataSpec, raw: Sequence[RawBatch]) -> Examples:
    """Return what artefacts record of the batches; the rows hold the labels alone."""
    from datasets import Dataset

    labelled = all(labels is not None for _, labels in raw)
    count = sum(len(next(iter(inputs.values()))) for inputs, _ in raw)
    rows: dict[str, list[Any]] = {"example": list(range(count))}
    if labelled:
        rows["label"] = [value for _, labels in raw for value in labels.tolist()]
    return Examples(
        data,
        Columns(label="label" if labelled else None),
        list(range(count)),
        Dataset.from_dict(rows),
        count,
        digest_chunks(_content(raw)),
    )


def _content(raw: Sequence[RawBatch]) -> Iterator[bytes]:
    for inputs, labels in raw:
        for name, tensor in sorted(inputs.items()):
            yield f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode()
            yield tensor.contiguous().view(torch.uint8).numpy().tobytes()
        if labels is not None:
            yield repr(labels.tolist()).encode()
