"""How the rows of a data set become examples: a task names the reader that its data wants."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from optin_cli.data.columns import Columns, find_columns
from optin_cli.data.sources import DataSpec

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class Encoded:
    """Text examples as token ids."""

    inputs: list[dict[str, list[int]]]
    """Of each example, not padded."""
    rows: list[int]
    """The row, by its position in the sample, that each example is of: ascending."""
    details: list[Any] = field(default_factory=list)
    """What else the task needs to know of each example; empty where that is nothing."""


class Reader:
    """A row is an example: a text, a pair of texts, a list of words, or an image."""

    masks: ClassVar[bool] = False
    """Labels are label maps beside the images."""

    def columns(self, dataset: Dataset, data: DataSpec, modality: str) -> Columns:
        """Find the columns. Raises what `find_columns` does."""
        return find_columns(dataset, data, modality, self.masks)

    def sides(self, columns: Columns) -> int:
        """How many examples a row makes at least; `--samples` counts examples."""
        return 1

    def encode(self, rows: Dataset, columns: Columns, processor: Any, max_length: int | None) -> Encoded:
        """The examples of rows of text. `processor` is a `batches.TextEncoder`."""
        texts = [rows[name][:] for name in columns.text]
        if columns.words:
            inputs = [processor.tokenize_words(words, max_length)[0] for words in texts[0]]
        else:
            texts = [plain(column) for column in texts]
            inputs = processor.tokenize(texts[0], texts[1] if len(texts) == 2 else None, max_length)
        return Encoded(inputs, list(range(len(inputs))))


class SidesReader(Reader):
    """Each of two text columns is an example of its own: example 2 * row + side."""

    def sides(self, columns: Columns) -> int:
        return max(1, len(columns.text))

    def encode(self, rows: Dataset, columns: Columns, processor: Any, max_length: int | None) -> Encoded:
        if self.sides(columns) == 1:
            return super().encode(rows, columns, processor, max_length)
        sides = [plain(rows[name][:]) for name in columns.text]
        texts = [text for row in zip(*sides, strict=True) for text in row]
        return Encoded(processor.tokenize(texts, None, max_length), [i // 2 for i in range(len(texts))])


class MaskReader(Reader):
    """A row is an image, with its label map where there is one."""

    masks = True


ROWS = Reader()
SIDES = SidesReader()
MASKS = MaskReader()


def plain(texts: list[Any]) -> list[str]:
    """Texts as strings, '' for missing ones."""
    return ["" if text is None else str(text) for text in texts]
