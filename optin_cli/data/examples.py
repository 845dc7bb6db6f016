"""Sample rows of a data set, reproducibly: which rows, and a fingerprint of what they hold."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from optin_cli.artefacts.files import digest_bytes
from optin_cli.data.columns import Columns, find_columns
from optin_cli.data.sources import DataSpec, open_split, open_stream, reading
from optin_cli.errors import InputError, UsageError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

log = logging.getLogger("optin")

_WINDOW = 20  # rows of a stream that are read for each one drawn
_FIRST_ROWS = 100  # that tell its columns


@dataclass
class Examples:
    """Sampled rows, in ascending order of their position in the split."""

    data: DataSpec
    columns: Columns
    row_ids: list[int]
    rows: Dataset
    total: int
    """Rows of the split; of a stream, those that the sample was drawn from."""
    fingerprint: str
    """SHA-256 of the sampled content (text, labels, encoded image bytes), whatever file it came from."""

    def describe(self) -> dict[str, Any]:
        """What an artefact records, and `examples_again` needs."""
        return {
            "spec": self.data.spec,
            "config": self.data.config,
            "split": self.data.split,
            "text": list(self.columns.text),
            "image": self.columns.image,
            "label": self.columns.label,
            "fingerprint": self.fingerprint,
            "rows": self.total,
            "stream": self.data.stream,
        }


def sample(
    data: DataSpec,
    modality: str,
    samples: int | None,
    seed: int,
    *,
    row_ids: list[int] | None = None,
    separate: bool = False,
    at_most: bool = False,
) -> Examples:
    """Open a split and take `samples` rows drawn by `seed` (all of them for None), or exactly `row_ids`.

    With `separate`, each of two text columns is an example of its own, so half as many rows are drawn.
    A split with fewer rows is used whole, with a note unless `at_most`. A stream is read no further than the first
    20 * `samples` rows, or the last of `row_ids`. Raises `InputError` for an empty split.
    """
    if samples is not None and samples < 1:
        raise UsageError(f"--samples {samples}: at least one example is needed")
    read = _from_stream if data.stream else _from_split
    columns, rows, found, total = read(data, modality, samples, seed, row_ids, separate)
    wanted = _rows_for(samples, columns, separate) if samples and row_ids is None else 0
    if wanted > total and not at_most:
        log.warning("%s has %d rows, fewer than the %d asked for: using all", data.spec, total, wanted)
    return Examples(data, columns, found, rows, total, _fingerprint(rows, columns))


Found = tuple[Columns, "Dataset", list[int], int]
"""Columns, the sampled rows, their positions, and how many there were to draw from."""


def _from_split(
    data: DataSpec,
    modality: str,
    samples: int | None,
    seed: int,
    row_ids: list[int] | None,
    separate: bool,
) -> Found:
    dataset = open_split(data)
    total = len(dataset)
    if total == 0:
        raise InputError(f"{data.spec} ({data.split}) is empty")
    columns = find_columns(dataset, data, modality)
    if row_ids is None:
        row_ids = _draw(total, samples and _rows_for(samples, columns, separate), seed)
    elif row_ids and row_ids[-1] >= total:
        raise InputError(f"{data.spec} ({data.split}) has {total} rows now; row {row_ids[-1]} is gone")
    return columns, dataset.select(row_ids), row_ids, total


def _from_stream(
    data: DataSpec,
    modality: str,
    samples: int | None,
    seed: int,
    row_ids: list[int] | None,
    separate: bool,
) -> Found:
    import datasets

    stream = open_stream(data)
    with reading(data):
        first = datasets.Dataset.from_list(list(stream.take(_FIRST_ROWS)), features=stream.features)
        if len(first) == 0:
            raise InputError(f"{data.spec} ({data.split}) is empty")
        columns = find_columns(first, data, modality)
        if row_ids is not None:
            found, total = _pick(stream, row_ids, row_ids[-1] + 1 if row_ids else 0)
            if len(found) < len(row_ids):
                raise InputError(
                    f"{data.spec} ({data.split}) has {total} rows now; row {row_ids[-1]} is gone"
                )
        elif samples is None:
            found = list(stream)
            total = len(found)
            row_ids = list(range(total))
        else:
            wanted = _rows_for(samples, columns, separate)
            total = window = _WINDOW * wanted
            row_ids = _draw(window, wanted, seed)
            found, total = _pick(stream, row_ids, window)
            if total < window:  # so short that it can be read again
                row_ids = _draw(total, wanted, seed)
                found, _ = _pick(stream, row_ids, total)
        if columns.image:
            found = [{**row, columns.image: _with_bytes(row[columns.image])} for row in found]
        rows = datasets.Dataset.from_list(found, features=stream.features)
        if columns.image:
            rows = rows.cast_column(columns.image, datasets.Image())  # the stream's are left undecoded
    return columns, rows, row_ids, total


def _pick(stream: IterableDataset, row_ids: list[int], window: int) -> tuple[list[dict[str, Any]], int]:
    """The rows of a stream at ascending positions, and how many of the first `window` there are."""
    wanted, found, seen = set(row_ids), [], 0
    for row in stream.take(window):
        if seen in wanted:
            found.append(row)
        seen += 1
    return found, seen


def _with_bytes(image: dict[str, Any]) -> dict[str, Any]:
    """An undecoded image with its content, wherever its path points."""
    if image["bytes"] is not None:
        return image
    import fsspec

    with fsspec.open(image["path"], "rb") as stream:
        return {**image, "bytes": stream.read()}


def _rows_for(samples: int, columns: Columns, separate: bool) -> int:
    """Rows that make `samples` examples."""
    return -(-samples // 2) if separate and len(columns.text) == 2 else samples


def _draw(total: int, samples: int | None, seed: int) -> list[int]:
    if samples is None or samples >= total:
        return list(range(total))
    return sorted(np.random.default_rng(seed).choice(total, samples, replace=False).tolist())


def _fingerprint(rows: Dataset, columns: Columns) -> str:
    names = [c for c in (*columns.text, columns.label) if c]
    chunks = [json.dumps([rows[name][:] for name in names], default=str).encode()]
    if columns.image:
        from datasets import Image

        for item in rows.cast_column(columns.image, Image(decode=False))[columns.image]:
            chunks.append(item["bytes"] if item["bytes"] is not None else _read(item["path"]))
    return digest_bytes(*chunks)


def _read(path: str) -> bytes:
    from pathlib import Path

    return Path(path).read_bytes()
