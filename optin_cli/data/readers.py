"""Readers turn the rows of a data set into examples: a task names the reader that its data wants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from optin_cli.data import usual_names
from optin_cli.data.columns import Columns, find_columns
from optin_cli.data.sources import DataSpec
from optin_cli.errors import InputError, UsageError, param

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
    """Further facts of each example that the task needs; empty if it needs none."""


class Reader:
    """A row is an example: a text, a pair of texts, a list of words, an image, or a recording."""

    masks: ClassVar[bool] = False
    """Labels are label maps beside the images."""
    windows: ClassVar[bool] = False
    """Examples are windows on longer texts."""

    def columns(self, dataset: Dataset, data: DataSpec, modality: str) -> Columns:
        """Find the columns. Raises what `find_columns` does."""
        return find_columns(dataset, data, modality, self.masks)

    def lacks_text(self, texts: Sequence[Any]) -> bool:
        """Return whether a row can't be read for want of text, given what its text columns hold."""
        return all(is_blank(text) for text in texts)

    def sides(self, columns: Columns) -> int:
        """The least number of examples that a row makes; samples are counted in examples."""
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
    """Each of two text columns is a separate example: example 2 * row + side."""

    def lacks_text(self, texts: Sequence[Any]) -> bool:
        return any(is_blank(text) for text in texts)

    def sides(self, columns: Columns) -> int:
        return max(1, len(columns.text))

    def encode(self, rows: Dataset, columns: Columns, processor: Any, max_length: int | None) -> Encoded:
        if self.sides(columns) == 1:
            return super().encode(rows, columns, processor, max_length)
        sides = [plain(rows[name][:]) for name in columns.text]
        texts = [text for row in zip(*sides, strict=True) for text in row]
        return Encoded(processor.tokenize(texts, None, max_length), [i // 2 for i in range(len(texts))])


class LabelsReader(Reader):
    """A row is an example with several labels or values: in one column of lists, or in a column each (`A,B,C`)."""

    def columns(self, dataset: Dataset, data: DataSpec, modality: str) -> Columns:
        """Raises `UsageError` for a label column that is not there."""
        if data.label is None or data.label in dataset.features:
            return find_columns(dataset, data, modality)
        names = tuple(part.strip() for part in data.label.split(","))
        if absent := [name for name in names if name not in dataset.features]:
            raise UsageError(
                f"{data.spec} has no column {absent[0]!r}", f"it has {', '.join(dataset.features)}"
            )
        rest = dataset.remove_columns(list(names))
        return replace(find_columns(rest, replace(data, label=None), modality), label=None, labels=names)


@dataclass
class Window:
    """The part of its context that a window of question answering shows."""

    offsets: np.ndarray
    """[tokens, 2]: the characters of the context that each token covers; -1 for other tokens."""
    none: int
    """The token that means no answer."""


class WindowReader(Reader):
    """A question with a part of its context is an example: as many as it takes for the context to be seen whole."""

    windows = True
    length = 384
    """Tokens of a window by default."""

    def lacks_text(self, texts: Sequence[Any]) -> bool:
        return any(is_blank(text) for text in texts)

    def columns(self, dataset: Dataset, data: DataSpec, modality: str) -> Columns:
        """`question` and `context` with `answers`; any pair of texts, without labels, where these are not."""
        features = dataset.features
        if not data.text and not {"question", "context"} <= set(features):
            found = find_columns(dataset, data, modality)
        else:
            text = data.text or ("question", "context")
            found = find_columns(dataset, replace(data, text=text), modality)
        label = data.label or ("answers" if "answers" in features else None)
        return replace(found, label=label)

    def encode(self, rows: Dataset, columns: Columns, processor: Any, max_length: int | None) -> Encoded:
        if len(columns.text) < 2 or columns.words:
            return super().encode(rows, columns, processor, max_length)
        questions, contexts = (plain(rows[name][:]) for name in columns.text)
        found = list(processor.windows(questions, contexts, max_length or self.length))
        row_ids, inputs, details = ([item[part] for item in found] for part in range(3))
        return Encoded(inputs, row_ids, details)


class RunningTextReader(Reader):
    """All rows are one text, each ended by a line break; its examples are windows that follow each other."""

    windows = True
    length = 512
    """Tokens of a window by default."""

    def lacks_text(self, texts: Sequence[Any]) -> bool:
        """A blank line is part of a text."""
        return False

    def columns(self, dataset: Dataset, data: DataSpec, modality: str) -> Columns:
        """The column `text` if there is one. The text is the label."""
        text = data.text or (("text",) if "text" in dataset.features else ())
        return replace(find_columns(dataset, replace(data, text=text), modality), label=None)

    def encode(self, rows: Dataset, columns: Columns, processor: Any, max_length: int | None) -> Encoded:
        texts = [lines(rows[name][:]) for name in columns.text]
        every = [line for row in zip(*texts, strict=True) for line in row]
        ended = [line if line.endswith("\n") else f"{line}\n" for line in every]
        inputs = processor.running_text(ended, max_length or self.length)
        if not inputs:
            raise InputError(
                "the sampled rows hold no text", f"sample more of them ({param('samples')}), or name a column"
            )
        return Encoded(inputs, list(range(len(inputs))))  # a window counts as a row: some are held out


class MaskedTextReader(Reader):
    """A row is an example, of which some tokens are masked; what they were is the label."""

    def columns(self, dataset: Dataset, data: DataSpec, modality: str) -> Columns:
        """Find the text, which is the label."""
        return replace(super().columns(dataset, data, modality), label=None, words=False)

    def encode(self, rows: Dataset, columns: Columns, processor: Any, max_length: int | None) -> Encoded:
        texts = [lines(rows[name][:]) for name in columns.text]
        found = processor.tokenize(texts[0], texts[1] if len(texts) == 2 else None, max_length)
        inputs, hidden = processor.masked(found)
        return Encoded(inputs, list(range(len(inputs))), hidden)


_MASKED_EVERY = 7


def masked_positions(tokens: int) -> list[int]:
    """Positions that are masked in a sequence of so many tokens: every seventh from the second on, at least one."""
    return list(range(1, tokens, _MASKED_EVERY)) or [0]


class TargetReader(Reader):
    """A row is a text and what is to be made of it; where there is no such column, the text itself."""

    names = usual_names.TARGETS
    """Columns that hold the target by default."""

    def lacks_text(self, texts: Sequence[Any]) -> bool:
        return any(is_blank(text) for text in texts)

    def columns(self, dataset: Dataset, data: DataSpec, modality: str) -> Columns:
        """Two text columns: `text` of two, `text` and `label`, a pair, or a text and a column of a usual name."""
        named = next((name for name in self.names if name in dataset.features), None)
        target = data.label or (None if len(data.text) == 2 else named)
        if target is None:
            return replace(find_columns(dataset, data, modality), label=None)
        if data.text:
            text = (data.text[0], target)
        else:
            rest = dataset.remove_columns([target]) if target in dataset.features else dataset
            text = (find_columns(rest, replace(data, label=None), modality).text[0], target)
        return replace(find_columns(dataset, replace(data, text=text, label=None), modality), label=None)

    def encode(self, rows: Dataset, columns: Columns, processor: Any, max_length: int | None) -> Encoded:
        texts = [lines(rows[name][:]) for name in columns.text]
        inputs, targets = processor.with_targets(texts[0], texts[-1], max_length)
        return Encoded(inputs, list(range(len(inputs))), targets)


class TranscriptReader(Reader):
    """A row is a recording and what is said in it."""

    names = usual_names.TRANSCRIPTS
    """Columns that hold the transcript by default."""

    def columns(self, dataset: Dataset, data: DataSpec, modality: str) -> Columns:
        """The recording, and the transcript: `text`, `label` or a column of a usual name."""
        features = dataset.features
        given = (*data.text, *filter(None, (data.label,)))
        if len(given) > 1:
            raise UsageError(
                f"{param('text')} takes one column, the transcript", f"{data.spec} has {', '.join(features)}"
            )
        name = next((name for name in (*given, *self.names) if name in features or name in given), None)
        found = find_columns(dataset, replace(data, text=(), label=None), modality)
        if name is None:
            raise InputError(
                f"{data.spec} has no column of transcripts; it has {', '.join(features)}",
                f"name one with {param('text')}",
            )
        rest = dataset.remove_columns([found.audio]) if found.audio else dataset
        text = find_columns(rest, replace(data, text=(name,), label=None, audio=None), "text").text
        return replace(found, label=None, text=text)

    def encode(self, rows: Dataset, columns: Columns, processor: Any, max_length: int | None) -> Encoded:
        """Return what the decoder reads of the transcripts, and their tokens."""
        inputs, targets = processor.with_transcripts(lines(rows[columns.text[0]][:]), max_length)
        return Encoded(inputs, list(range(len(inputs))), targets)


class MaskReader(Reader):
    """A row is an image, with its label map where there is one."""

    masks = True


ROWS = Reader()
SIDES = SidesReader()
LABELS = LabelsReader()
WINDOWS = WindowReader()
RUNNING_TEXT = RunningTextReader()
MASKED_TEXT = MaskedTextReader()
TARGETS = TargetReader()
MASKS = MaskReader()
TRANSCRIPTS = TranscriptReader()


def is_blank(text: Any) -> bool:
    """Return whether a text, or a list of words, holds nothing to read."""
    return text is None or not (text if isinstance(text, list) else str(text).strip())


def plain(texts: list[Any]) -> list[str]:
    """Texts as strings, '' for missing ones."""
    return ["" if text is None else str(text) for text in texts]


def lines(texts: list[Any]) -> list[str]:
    """Texts, or lists of their words, as strings."""
    return plain([" ".join(text) if isinstance(text, list) else text for text in texts])
