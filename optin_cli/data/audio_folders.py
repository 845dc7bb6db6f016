"""Folders of recordings as tables: a row for each file, by class folder or by the `metadata` file beside them.

`datasets` has a reader for these, but it needs torchcodec even to list the files.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from optin_cli.data.audio import SUFFIXES
from optin_cli.data.metadata import FILE, damaged, metadata_of, read_metadata

if TYPE_CHECKING:
    from datasets import Dataset


def holds_recordings(folder: Path, others: set[str]) -> bool:
    """Return whether the first file below `folder` that is a recording, or has a suffix of `others`, is the former."""
    suffixes = (file.suffix.lower() for file in sorted(folder.rglob("*")))
    return next((suffix in SUFFIXES for suffix in suffixes if suffix in SUFFIXES | others), False)


def open_recordings(folder: Path) -> Dataset:
    """Columns `audio`, with the paths of the files, and `label`, the names of their folders where there are several;
    or the columns of `metadata.csv` or `metadata.jsonl`, of which `file_name` is the path.

    Raises `InputError` for a metadata file with a damaged line, or one that names no file.
    """
    import datasets

    folder = folder.absolute()
    if (metadata := metadata_of(folder)) is not None:
        return _described(folder, metadata)
    files = [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in SUFFIXES]
    table: dict[str, list[Any]] = {"audio": [str(file) for file in files]}
    classes = sorted({file.parent.name for file in files})
    if len(classes) < 2:
        return datasets.Dataset.from_dict(table)
    table["label"] = [classes.index(file.parent.name) for file in files]
    kinds = {"audio": datasets.Value("string"), "label": datasets.ClassLabel(names=classes)}
    return datasets.Dataset.from_dict(table, features=datasets.Features(kinds))


def _described(folder: Path, metadata: Path) -> Dataset:
    import datasets

    table = []
    for line, row in read_metadata(metadata):
        file = row.get(FILE)
        if not file or not isinstance(file, str):
            raise damaged(metadata, line, f"{FILE} has to be the path of its file")
        rest = {name: value for name, value in row.items() if name not in (FILE, "audio")}
        table.append({"audio": str(folder / file), **rest})
    return datasets.Dataset.from_list(table)
