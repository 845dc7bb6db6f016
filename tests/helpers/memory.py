"""Random texts as a data set in memory, for machines without `datasets`: the GPU's tests and benchmark run on these.

`--data words:ROWSxWORDS` names so many texts of so many words that the tiny tokenizers know.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from helpers.data import sentences
from optin_cli.architectures.positions import image_size
from optin_cli.data import examples
from optin_cli.data.batches import Batches
from optin_cli.data.columns import Columns
from optin_cli.data.examples import Examples
from optin_cli.data.rows import draw
from optin_cli.data.sources import DataSpec
from optin_cli.errors import UsageError
from optin_cli.loading.checkpoint import OpenModel

_PREFIX = "words:"


def words(rows: int, count: int) -> DataSpec:
    """`rows` random texts of `count` words each."""
    return DataSpec(f"{_PREFIX}{rows}x{count}")


class Texts:
    """What readers ask of a `datasets.Dataset`: columns `text` and `label` (0 or 1)."""

    def __init__(self, texts: Sequence[str], labels: Sequence[int]) -> None:
        self.columns = {"text": list(texts), "label": list(labels)}
        self.features: dict[str, Any] = {
            "text": SimpleNamespace(dtype="string"), "label": SimpleNamespace(dtype="int64")
        }  # fmt: skip

    def __len__(self) -> int:
        return len(self.columns["text"])

    def __getitem__(self, column: str) -> list[Any]:
        return self.columns[column]

    def select(self, row_ids: Sequence[int]) -> Texts:
        return Texts(*([column[i] for i in row_ids] for column in self.columns.values()))


class TextRows:
    """Stands for `optin_cli.data.rows.SplitRows`."""

    def __init__(self, data: DataSpec) -> None:
        if not data.spec.startswith(_PREFIX):
            raise UsageError(f"{data.spec} is no data in memory", f"write {_PREFIX}ROWSxWORDS")
        rows, count = map(int, data.spec.removeprefix(_PREFIX).split("x"))
        self.data = data
        self.first = Texts(sentences(rows, words=(count, count + 1)), [i % 2 for i in range(rows)])
        self.total = rows

    def draw(self, samples: int | None, seed: int) -> list[int]:
        return draw(self.total, samples, seed)

    def at(self, row_ids: list[int], stored: str | None = None) -> Texts:
        return self.first.select(row_ids)


class PixelBatches(Batches):
    """Random images, (3, height, width), that no file holds."""

    def __init__(self, examples: Examples, model: OpenModel, batch_size: int) -> None:
        super().__init__(examples, model.processor, batch_size, reader=model.task.reader)
        self.size = image_size(model.module)

    def _decoded(self, index: int) -> np.ndarray:
        rng = np.random.default_rng(index)
        return rng.standard_normal((len(self.ids(index)), 3, *self.size), dtype=np.float32)


def pixels(model: OpenModel, count: int, batch_size: int = 6) -> Batches:
    """Batches of `count` random images of the size that a model takes."""
    ids = list(range(count))
    found = Examples(DataSpec("pixels", workers=0), Columns(image="image"), ids, ids, count, "")  # type: ignore[arg-type]
    return PixelBatches(found, model, batch_size)


def serve_words() -> None:
    """Let this process read `words:ROWSxWORDS`, and nothing else."""
    examples.SplitRows = TextRows  # type: ignore[misc, assignment]
