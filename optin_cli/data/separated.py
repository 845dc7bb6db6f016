"""Files of separated values as people write them: which separator, which encoding, and whether there is a header."""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import BinaryIO

from optin_cli.errors import InputError, param

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_HEAD = 1 << 16  # bytes that are looked at
_SAMPLE = 200  # bytes that show an encoding of two bytes a letter
_ROWS = 200  # rows that are looked at
_SENTENCE = 4  # words, from which on a cell is rather a text than a name
_BOMS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


@dataclass(frozen=True)
class Separated:
    """The first rows of a file, cut at a separator."""

    separator: str
    header: list[str]
    rows: list[list[str]]

    @property
    def is_even(self) -> bool:
        """Return whether every row has the header's fields, which are several."""
        return len(self.header) > 1 and all(len(row) == len(self.header) for row in self.rows)


def separated(path: Path, usual: str) -> Separated:
    """The first rows of a file: cut at the `usual` separator, or at another one if that alone cuts all rows evenly.

    Raises `InputError` for another encoding than UTF-8, and for a first row with more fields than the header, of which
    readers make an index in silence.
    """
    check_encoding(path)
    text, whole = _head(path)
    found = {separator: _cut(text, separator, whole) for separator in dict.fromkeys((usual, *SEPARATORS))}
    even = [table for table in found.values() if table.is_even]
    chosen = found[usual]
    if even and not chosen.is_even:
        chosen = max(even, key=lambda table: len(table.header))
    if chosen.rows and len(chosen.rows[0]) > len(chosen.header):
        by = SEPARATORS[chosen.separator]
        raise InputError(
            f"the first row of {path} has {len(chosen.rows[0])} fields separated by {by}, and its header has "
            f"{len(chosen.header)}",
            f"put texts that hold {by} between quotation marks, or give a file of another kind (.jsonl, .txt)",
        )
    return chosen


def check_header(table: Separated, path: Path, known: Iterable[str], named: Iterable[str]) -> None:
    """Raise `InputError` if the first line is rather a row: a number, a text, or a value that its column has again.

    `known` are usual names of columns, and `named` those that the user gave: one of them makes it a header.
    """
    header = [cell.strip() for cell in table.header]
    lower = {cell.lower() for cell in header}
    if not table.rows or lower & set(known) or set(header) & set(named):
        return
    if [cell for cell in header if cell] == [str(i) for i in range(sum(map(bool, header)))]:
        return  # pandas numbers columns without names
    columns = [[row[i].strip() for row in table.rows if i < len(row)] for i in range(len(header))]
    if any(_is_value(cell, values) for cell, values in zip(header, columns, strict=True)):
        shown = ", ".join(map(repr, (cell[:40] for cell in header[:3])))
        raise InputError(
            f"{path} seems to have no header: its first line is {shown}",
            f"put the names of its columns above it (text{table.separator}label), or name columns if these are names "
            f"({param('text', meta='NAME')})",
        )


def _is_value(cell: str, values: Sequence[str]) -> bool:
    if not cell or not values:
        return False
    if _is_number(cell):
        return all(_is_number(value) for value in values if value)
    long = len(cell.split()) >= _SENTENCE and mean(len(value.split()) for value in values) >= _SENTENCE
    return long or cell in values


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _head(path: Path) -> tuple[str, bool]:
    """(the beginning of a file as text, whether it is all of it)"""
    with path.open("rb") as stream:
        content = stream.read(_HEAD)
        whole = not stream.read(1)
    return content.decode("utf-8-sig", errors="ignore"), whole


def _cut(text: str, separator: str, whole: bool) -> Separated:
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator))
    except csv.Error:
        return Separated(separator, [], [])
    rows = [row for row in (rows if whole else rows[:-1]) if row][: _ROWS + 1]
    return Separated(separator, rows[0], rows[1:]) if rows else Separated(separator, [], [])


def check_encoding(path: Path, all_of_it: bool = False) -> None:
    """Raise `InputError` for a file of text that is not UTF-8, with how to convert it. Looks at the beginning alone,
    unless at `all_of_it`."""
    with path.open("rb") as stream:
        first = stream.read(_HEAD)
        name = next((name for bom, name in _BOMS.items() if first.startswith(bom)), "")
        if not name and first[:_SAMPLE].count(0) > _SAMPLE // 4:
            name = "UTF-16LE" if first[1:_SAMPLE:2].count(0) > first[:_SAMPLE:2].count(0) else "UTF-16BE"
        line = 1 if name else _first_fault(first, stream if all_of_it else io.BytesIO())
    if not line:
        return
    name = name or ("" if b"\0" in first else "WINDOWS-1252")
    raise InputError(
        f"{path} can't be read as data: line {line} is not UTF-8, it looks like {name or 'no text at all'}",
        f"convert it: iconv -f {name} -t UTF-8 {path.name} > utf8-{path.name}"
        if name
        else "check that the contents are what the suffix says",
    )


def _first_fault(chunk: bytes, rest: BinaryIO) -> int:
    """The number of the first line that is not UTF-8; 0 if all are."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    while chunk:
        try:
            line += decoder.decode(chunk).count("\n")
        except UnicodeDecodeError as error:
            return line + chunk[: error.start].count(b"\n")
        chunk = rest.read(_HEAD)
    return 0
