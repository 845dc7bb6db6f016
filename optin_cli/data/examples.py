"""Sample rows of a data set, reproducibly: which rows, and a fingerprint of what they hold."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from optin_cli.artefacts.files import digest_bytes
from optin_cli.data.columns import Columns, find_columns
from optin_cli.data.sources import DataSpec, open_split
from optin_cli.errors import InputError, UsageError

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger("optin")


@dataclass
class Examples:
    """Sampled rows, in ascending order of their position in the split."""

    data: DataSpec
    columns: Columns
    row_ids: list[int]
    rows: Dataset
    total: int
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
        }


def sample(
    data: DataSpec,
    modality: str,
    samples: int | None,
    seed: int,
    *,
    row_ids: list[int] | None = None,
    separate: bool = False,
) -> Examples:
    """Open a split and take `samples` rows drawn by `seed` (all of them for None), or exactly `row_ids`.

    With `separate`, each of two text columns is an example of its own, so half as many rows are drawn.
    A split with fewer rows is used whole, with a note. Raises `InputError` for an empty split.
    """
    if samples is not None and samples < 1:
        raise UsageError(f"--samples {samples}: at least one example is needed")
    dataset = open_split(data)
    total = len(dataset)
    if total == 0:
        raise InputError(f"{data.spec} ({data.split}) is empty")
    columns = find_columns(dataset, data, modality)
    if samples is not None and separate and len(columns.text) == 2:
        samples = -(-samples // 2)
    if row_ids is None:
        row_ids = _draw(total, samples, seed)
        if samples is not None and samples > total:
            log.warning("%s has %d rows, fewer than the %d asked for: using all", data.spec, total, samples)
    elif row_ids and row_ids[-1] >= total:
        raise InputError(f"{data.spec} ({data.split}) has {total} rows now; row {row_ids[-1]} is gone")
    rows = dataset.select(row_ids)
    return Examples(data, columns, row_ids, rows, total, _fingerprint(rows, columns))


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
