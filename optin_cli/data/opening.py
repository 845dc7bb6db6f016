"""From data in any form to batches: the one place where the stages open data."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from optin_cli.data.batches import Batches
from optin_cli.data.examples import sample
from optin_cli.data.from_memory import BatchStore, HeldBatches
from optin_cli.data.sources import IN_MEMORY, DataSpec
from optin_cli.errors import UsageError, param


class ReadsData(Protocol):
    """The part of a model (`loading.checkpoint.OpenModel`) that opening data needs."""

    @property
    def module(self) -> Any: ...
    @property
    def processor(self) -> Any: ...
    @property
    def family(self) -> Any: ...
    @property
    def task(self) -> Any: ...


def as_data(data: Any, split: str | None = None) -> DataSpec:
    """Data as the caller has it: a DATA argument, a `DataSpec`, a `Dataset` (or `IterableDataset`, or a `DatasetDict`,
    of which `split` is taken), a list of texts or of rows, a DataLoader, or any other iterable of batches.

    `split` replaces that of a `DataSpec`. Raises `UsageError` for anything else.
    """
    if isinstance(data, DataSpec):
        return replace(data, split=split) if split else data
    if isinstance(data, str | Path):
        return DataSpec(str(data), split or "train")
    import datasets

    if isinstance(data, datasets.DatasetDict):
        chosen = split or "train"
        if chosen not in data:
            raise UsageError(f"the DatasetDict has no split {chosen!r}", f"it has {', '.join(data)}")
        return replace(as_data(data[chosen]), split=chosen)
    if isinstance(data, datasets.IterableDataset):
        return _in_memory("IterableDataset", data, stream=True)
    if isinstance(data, list) and data and all(isinstance(item, str) for item in data):
        data = datasets.Dataset.from_dict({"text": data})
    if isinstance(data, list) and data and all(_is_row(item) for item in data):
        data = datasets.Dataset.from_list(data)
    if isinstance(data, datasets.Dataset):
        return _in_memory("Dataset", data)
    if isinstance(data, Mapping) or not isinstance(data, Iterable) or _is_dataset(data):
        raise UsageError(
            f"a {type(data).__name__} is not data that can be read",
            "give a name or path, a datasets.Dataset, a DataLoader, or an iterable of batches",
        )
    kind = "DataLoader" if type(data).__name__ == "DataLoader" else "batches"
    return _in_memory(kind, BatchStore(data))


def _in_memory(kind: str, held: Any, stream: bool = False) -> DataSpec:
    return DataSpec(f"{IN_MEMORY}{kind}", split="given", stream=stream, held=held)


def _is_row(item: Any) -> bool:
    """Return whether an item is a row of a table; a dict of tensors is a batch."""
    from torch import Tensor

    return isinstance(item, Mapping) and not any(isinstance(value, Tensor) for value in item.values())


def _is_dataset(data: Any) -> bool:
    """Return whether it gives examples rather than batches of them."""
    from torch.utils.data import Dataset

    return isinstance(data, Dataset)


def open_batches(
    data: DataSpec,
    model: ReadsData,
    samples: int | None,
    batch_size: int,
    seed: int,
    *,
    row_ids: list[int] | None = None,
    at_most: bool = False,
    max_length: int | None = None,
    together: bool = False,
    shuffle: int | None = None,
) -> Batches:
    """Batches of `samples` examples that `seed` draws (all for None), as `model` reads them.

    `row_ids` and `at_most` are those of `sample`, the rest those of `Batches`. Batches that the caller made are taken
    as they are, the first ones: size, length and order are theirs. Raises what `sample` raises.
    """
    for name, value, least in (("seed", seed, 0), ("max_length", max_length, 1)):
        if value is not None and value < least:
            raise UsageError(f"{param(name, value)}: at least {least} is needed")
    reader = model.task.reader
    if isinstance(data.held, BatchStore):
        names = [name for name in inspect.signature(model.module.forward).parameters if name != "self"]
        return HeldBatches(data, samples, names, reader)
    examples = sample(
        data, model.family.modality, samples, seed, row_ids=row_ids, reader=reader, at_most=at_most
    )
    return Batches(
        examples, model.processor, batch_size, max_length=max_length, reader=reader, together=together,
        shuffle=shuffle,
    )  # fmt: skip
