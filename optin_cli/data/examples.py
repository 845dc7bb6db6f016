"""Sample rows of a data set, reproducibly: which rows, and a fingerprint of what they hold."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from optin_cli.artefacts.facts import DataFacts
from optin_cli.artefacts.files import digest_chunks
from optin_cli.data.blank_texts import leave_out_blank
from optin_cli.data.broken_files import leave_out_broken, undecoded
from optin_cli.data.columns import Columns
from optin_cli.data.encoded_files import encoded
from optin_cli.data.readers import ROWS, Reader
from optin_cli.data.rows import SplitRows, StreamRows
from optin_cli.data.sources import DataSpec
from optin_cli.errors import UsageError, param

if TYPE_CHECKING:
    from datasets import Dataset

_SHOWN = 60  # characters of an example

log = logging.getLogger("optin")


@dataclass
class Examples:
    """Sampled rows, in ascending order of their position in the split."""

    data: DataSpec
    columns: Columns
    row_ids: list[int]
    rows: Dataset
    """Images and recordings are undecoded: see `data.kinds`."""
    total: int
    """Rows of the split; of a stream, those that the sample was drawn from."""
    fingerprint: str
    """SHA-256 of the sampled content (text, labels, encoded files), whatever file it came from."""
    broken: list[int] = field(default_factory=list)
    """Rows whose files can't be used: they are left out, and others drawn in their place where there are any."""

    @property
    def where(self) -> str:
        """The data's name in errors."""
        return f"{self.data.spec} ({self.data.split})"

    @property
    def reading(self) -> str:
        """The columns taken for the text, with what they hold first; '' if there are none."""
        columns = " and ".join(f"{name!r} ({_shown(self.rows[0][name])})" for name in self.columns.text)
        label = f", the label from {self.columns.label!r}" if self.columns.label else ""
        return f"{self.where}: reading the text from {columns}{label}" if columns else ""

    def describe(self) -> DataFacts:
        """Return what an artefact records, and `examples_again` needs."""
        return {
            "spec": self.data.spec,
            "config": self.data.config,
            "split": self.data.split,
            "text": list(self.columns.text),
            "image": self.columns.image,
            "audio": self.columns.audio,
            "label": self.columns.label or ",".join(self.columns.labels) or None,
            "mask": self.columns.mask,
            "ignore_index": self.data.ignore_index,
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
    reader: Reader = ROWS,
    at_most: bool = False,
) -> Examples:
    """Open a split and take `samples` rows drawn by `seed` (all of them for None), or exactly `row_ids`.

    Where `reader` makes two examples of a row, half as many rows are drawn.
    A split with fewer rows is used whole, with a note unless `at_most`. A stream is read no further than the first
    20 * `samples` rows, or the last of `row_ids`. Rows with broken files or without text are left out, with a warning,
    and others are drawn in their place. Raises `InputError` for an empty split, and when too many are.
    """
    if samples is not None and samples < 1:
        raise UsageError(f"{param('samples', samples)}: at least one example is needed")
    source = StreamRows(data) if data.stream else SplitRows(data)
    columns = reader.columns(source.first, data, modality)
    wanted = samples and -(-samples // reader.sides(columns))
    drawn = source.draw(wanted, seed) if row_ids is None else row_ids
    broken: list[int] = []
    if columns.stored:
        drawn, broken = leave_out_broken(source, columns, drawn, seed, exactly=row_ids is not None)
        rows = undecoded(source.at(drawn, columns.stored), columns, data)
    else:
        if row_ids is None:
            drawn = leave_out_blank(source, columns.text, reader, drawn, seed)
        rows = source.at(drawn)
    if wanted and row_ids is None and wanted > source.total and not at_most:
        log.warning("%s has %d rows, fewer than the %d asked for: using all", data.spec, source.total, wanted)
    return Examples(data, columns, drawn, rows, source.total, _fingerprint(rows, columns), broken)


def _shown(text: Any) -> str:
    """The beginning of a text, or of a list of words, in quotes."""
    line = " ".join((" ".join(map(str, text)) if isinstance(text, list) else str(text)).split())
    return repr(line if len(line) <= _SHOWN else f"{line[: _SHOWN - 2]}..")


def _fingerprint(rows: Dataset, columns: Columns) -> str:
    return digest_chunks(_content(rows, columns))


def _content(rows: Dataset, columns: Columns) -> Iterator[bytes]:
    """Yield what the used columns hold; one file at a time, since all may be more than memory."""
    names = [c for c in (*columns.text, columns.label, *columns.labels) if c]
    yield json.dumps([rows[name][:] for name in names], default=str).encode()
    for column in filter(None, (columns.stored, columns.mask)):
        for stored in rows[column]:  # a mask that is missing is reported where it is read
            yield b"" if stored is None else encoded(stored)
