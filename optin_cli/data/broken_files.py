"""Find broken files among the sampled rows by decoding each once, name them in one warning, and replace them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from optin_cli.data.columns import Columns
from optin_cli.data.encoded_files import BrokenFile, name_of
from optin_cli.data.kinds import Kind, kind_of
from optin_cli.data.rows import SplitRows, StreamRows, spare
from optin_cli.data.sources import DataSpec
from optin_cli.data.workers import in_order, worker_count
from optin_cli.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger("optin")

MOST_BROKEN = 0.1
"""Share of the rows beyond which something is wrong with the data, not with a file."""
_SHOWN = 10  # broken files that are named
_CHUNK = 32  # files that are checked at a time
_MANY = 2000  # files that take so long to check that it is worth saying


def undecoded(rows: Dataset, columns: Columns, data: DataSpec) -> Dataset:
    """The columns that are used, with files as they are stored: one that is broken stops nobody else.

    Paths of recordings are taken from where the data is.
    """
    from datasets import Audio, Image

    used = (columns.stored, columns.mask, columns.label, *columns.labels, *columns.text)
    rows = rows.select_columns([column for column in used if column])
    for column in filter(None, (columns.stored, columns.mask)):
        feature = rows.features[column]
        if isinstance(feature, Image | Audio):
            rows = rows.cast_column(column, type(feature)(decode=False))
        elif column == columns.audio and getattr(feature, "dtype", None) in ("string", "large_string"):
            rows = _with_files(rows, column, data)
    return rows


def _with_files(rows: Dataset, column: str, data: DataSpec) -> Dataset:
    """A column of paths as one of files."""
    from datasets import Features, Value

    table = {name: rows[name][:] for name in rows.features}
    table[column] = [{"bytes": None, "path": path and data.beside(path)} for path in table[column]]
    features = Features({**rows.features, column: {"bytes": Value("binary"), "path": Value("string")}})
    return type(rows).from_dict(table, features=features)


def leave_out_broken(
    source: SplitRows | StreamRows, columns: Columns, row_ids: list[int], seed: int, *, exactly: bool = False
) -> tuple[list[int], list[int]]:
    """Rows with sound files, in ascending order, as many as `row_ids` where there are so many; and the broken ones.

    Only drawn rows are decoded. For each broken one the next spare row is drawn, in an order that the seed fixes.
    Raises `InputError` if more than a tenth of the rows that were looked at are broken; with `exactly`, if any is.
    """
    kind, column = kind_of(columns), columns.stored
    assert column is not None
    only = Columns(image=columns.image, audio=columns.audio)
    sound: list[int] = []
    broken: dict[int, str] = {}
    waiting, spares = row_ids, None
    while waiting:
        rows = undecoded(source.at(waiting, column), only, source.data)
        faults = _faults(rows, column, kind, source.data, waiting)
        broken |= faults
        sound += [i for i in waiting if i not in faults]
        if broken and exactly:
            raise InputError(f"{source.data.spec} ({source.data.split}): {_listed(broken)}")
        checked = len(sound) + len(broken)
        if len(broken) > MOST_BROKEN * checked:
            raise InputError(
                f"{len(broken)} of {checked} {kind.name}s of {source.data.spec} ({source.data.split}) are broken, more "
                f"than a tenth: {_listed(broken)}",
                f"check how the data was copied, and whether {kind.option} names the right column",
            )
        if broken and spares is None:
            spares = iter(spare(source.total, row_ids, seed))
        waiting = sorted(islice(spares or (), len(row_ids) - len(sound)))
    if broken:
        log.warning(
            "%d of %d %ss of %s (%s) are broken and left out%s: %s",
            len(broken),
            len(sound) + len(broken),
            kind.name,
            source.data.spec,
            source.data.split,
            ", others taken in their place" if len(sound) == len(row_ids) else "",
            _listed(broken),
        )
    return sorted(sound), sorted(broken)


def _faults(rows: Dataset, column: str, kind: Kind, data: DataSpec, row_ids: list[int]) -> dict[int, str]:
    """The faults of the broken ones, by row id."""
    if len(rows) >= _MANY:
        log.info("looking for broken files among %d %ss of %s", len(rows), kind.name, data.spec)
    workers = worker_count(data.workers, len(rows))
    chunks = in_order(_Check(rows, column, kind), -(-len(rows) // _CHUNK), workers)
    found = [fault for chunk in chunks for fault in chunk]
    return {i: fault for i, fault in zip(row_ids, found, strict=True) if fault is not None}


@dataclass
class _Check:
    """Chunk index -> for each file what is wrong with it, or None."""

    rows: Dataset
    column: str
    kind: Kind

    def __call__(self, index: int) -> list[str | None]:
        chunk = self.rows[index * _CHUNK : (index + 1) * _CHUNK][self.column]
        return [_fault(stored, self.kind) for stored in chunk]


def _fault(stored: object, kind: Kind) -> str | None:
    try:
        kind.decode(stored)
    except BrokenFile as error:
        name = name_of(stored)
        return f"{name}: {error}" if name else str(error)
    return None


def _listed(broken: Mapping[int, str]) -> str:
    """`row 3 (a.png: it is empty), row 7 (..) and 12 more`."""
    lines = [f"row {i} ({broken[i]})" for i in sorted(broken)[:_SHOWN]]
    more = len(broken) - len(lines)
    return ", ".join(lines) + (f" and {more} more" if more else "")
