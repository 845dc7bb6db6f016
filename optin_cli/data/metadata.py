"""The `metadata.csv` or `metadata.jsonl` of a folder of files: a row a file; a damaged line is named by its number."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

from optin_cli.errors import InputError

FILE = "file_name"  # what `datasets` calls the column

Row = tuple[int, dict[str, Any]]
"""The number of its last line, and its columns."""


def metadata_of(folder: Path) -> Path | None:
    """The metadata file right within `folder`."""
    return next((path for name in _READERS if (path := folder / name).is_file()), None)


def read_metadata(path: Path) -> list[Row]:
    """All rows. Raises `InputError` that names the file and the line where it is damaged."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise damaged(path, line, "it is not UTF-8") from error
    return list(_READERS[path.name](path, text))


def check_metadata(folder: Path) -> None:
    """Raise `InputError` for the first damaged line of the metadata files in `folder` and below."""
    for path in sorted(file for name in _READERS for file in folder.rglob(name)):
        read_metadata(path)


def damaged(path: Path, line: int, why: str) -> InputError:
    return InputError(f"line {line} of {path} can't be used: {why}", "mend the line, or leave it out")


def _csv(path: Path, text: str) -> Iterator[Row]:
    rows = csv.DictReader(StringIO(text, newline=""), strict=True)
    try:
        for row in rows:
            if None in row:
                raise damaged(path, rows.line_num, f"it has more than {len(row) - 1} columns")
            yield rows.line_num, row
    except csv.Error as error:
        raise damaged(path, rows.line_num + 1, str(error)) from error  # where the row begins


def _jsonl(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(StringIO(text), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.strip())
        except ValueError as error:
            why = str(error).partition(": line 1")[0]  # of the text that was parsed
            raise damaged(path, number, f"it is no JSON: {why}") from error
        if not isinstance(row, dict):
            raise damaged(path, number, "it is no JSON object")
        yield number, row


_READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {"metadata.csv": _csv, "metadata.jsonl": _jsonl}
