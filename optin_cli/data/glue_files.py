"""GLUE's own files: `train.tsv`, `dev.tsv` and so on, tab-separated and without quoting, each task with columns of its
own. They become the columns, classes and numbers of the hub's data set."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optin_cli.data.folders import names_of
from optin_cli.data.glue import HIDDEN, GlueTask
from optin_cli.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger("optin")


def file_of(folder: Path, task: GlueTask, split: str) -> Path | None:
    """The file of a split, by the hub's name of it; None where there is none, or it has other columns."""
    stems = sorted({name.replace("validation", "dev") for name in names_of(split)})
    found = next((path for stem in stems if (path := folder / f"{stem}.tsv").is_file()), None)
    return found if found is not None and _columns(found, task) is not None else None


def load(file: Path, task: GlueTask) -> Dataset:
    """One row an example; rows that lack a text or the label are left out, with a warning.

    The label is -1 where a test split hides it. Raises `InputError` for a label that the task does not have.
    """
    import datasets

    columns = _columns(file, task)
    assert columns is not None
    label = datasets.ClassLabel(names=list(task.classes)) if task.classes else datasets.Value("float32")
    features = {**dict.fromkeys(task.texts, datasets.Value("string")), "label": label}
    wanted = {name: columns.index(column) for name, column in task.texts.items()}
    if task.label in columns:
        wanted["label"] = columns.index(task.label)
    table: dict[str, list[Any]] = {name: [] for name in features}
    short = 0
    for fields in _rows(file, headed=columns != task.headless):
        stored = {name: fields[index] for name, index in wanted.items() if index < len(fields)}
        if len(stored) < len(wanted) or stored.get("label") == "":
            short += 1
            continue
        table["label"].append(_number(stored.pop("label", str(HIDDEN)), task, file))
        for name, text in stored.items():
            table[name].append(text)
    if short:
        log.warning("%s: %d rows without a text or a label are left out", file, short)
    if not table["label"]:
        raise InputError(f"{file} is empty")
    return datasets.Dataset.from_dict(table, features=datasets.Features(features))


def _columns(file: Path, task: GlueTask) -> tuple[str, ...] | None:
    """The names of a file's columns; None where they are not the task's."""
    first = tuple(next(_rows(file, headed=False), ()))
    if set(task.texts.values()) <= set(first):
        return first
    if task.headless and len(first) == len(task.headless):
        numbers = map(str, range(len(task.classes)))
        return task.headless if first[task.headless.index(task.label)] in numbers else None
    return None


def _rows(file: Path, headed: bool) -> Iterator[list[str]]:
    """The fields of each row. A quotation mark is a character as any other."""
    with file.open(encoding="utf-8-sig", newline="\n") as stream:  # MRPC begins with a byte order mark
        for number, line in enumerate(stream):
            text = line.rstrip("\r\n")
            if text and (number or not headed):
                yield text.split("\t")


def _number(stored: str, task: GlueTask, file: Path) -> float:
    if stored in task.classes:
        return task.classes.index(stored)
    try:
        number = float(stored)
    except ValueError:
        number = float("nan")
    if not task.classes and number == number:
        return number
    if number == HIDDEN or number in range(len(task.classes)):
        return int(number)
    raise InputError(f"{file} has the label {stored!r}; the task has {', '.join(task.classes) or 'numbers'}")
