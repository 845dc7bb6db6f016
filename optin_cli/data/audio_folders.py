"""Folders of recordings as tables: a row for each file, by class folder or by the `metadata` file beside them.

`datasets` has a reader of its own for these, but it needs torchcodec even to list the files.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optin_cli.data.audio import SUFFIXES
from optin_cli.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

_FILE = "file_name"  # what `datasets` calls the column in a metadata file


def holds_recordings(folder: Path, others: set[str]) -> bool:
    """Whether the first file below `folder` that is a recording, or has one of the `others` suffixes, is the former."""
    suffixes = (file.suffix.lower() for file in sorted(folder.rglob("*")))
    return next((suffix in SUFFIXES for suffix in suffixes if suffix in SUFFIXES | others), False)


def open_recordings(folder: Path) -> Dataset:
    """Columns `audio`, with the paths of the files, and `label`, the names of their folders where there are several;
    or the columns of `metadata.csv` or `metadata.jsonl`, of which `file_name` is the path.

    Raises `InputError` for a metadata file that names no files.
    """
    import datasets

    folder = folder.absolute()
    for name, read in (("metadata.csv", _csv), ("metadata.jsonl", _jsonl)):
        if (folder / name).is_file():
            return _described(folder, read(folder / name), name)
    files = [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in SUFFIXES]
    table: dict[str, list[Any]] = {"audio": [str(file) for file in files]}
    classes = sorted({file.parent.name for file in files})
    if len(classes) < 2:
        return datasets.Dataset.from_dict(table)
    table["label"] = [classes.index(file.parent.name) for file in files]
    kinds = {"audio": datasets.Value("string"), "label": datasets.ClassLabel(names=classes)}
    return datasets.Dataset.from_dict(table, features=datasets.Features(kinds))


def _described(folder: Path, rows: list[dict[str, Any]], name: str) -> Dataset:
    import datasets

    if any(not row.get(_FILE) for row in rows):
        raise InputError(f"{folder / name} has rows without {_FILE}", "give every row the path of its file")
    table = [
        {"audio": str(folder / row[_FILE]), **{k: v for k, v in row.items() if k not in (_FILE, "audio")}}
        for row in rows
    ]
    return datasets.Dataset.from_list(table)


def _csv(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def _jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
