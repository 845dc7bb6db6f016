"""The tasks of GLUE (Wang et al. 2019) by name: columns, classes, which split is the validation set, and which
metrics count."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from optin_cli.data.folders import names_of
from optin_cli.errors import InputError, UsageError, param

if TYPE_CHECKING:
    from datasets import Dataset


HOME = "nyu-mll/glue"
HIDDEN = -1
"""The label of every row in test splits."""
_FOLDERS = ("glue", "glue_data")
"""Names of the folder that holds the tasks; the second is that of GLUE's download."""
_MATCHED = {
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation_matched"),
    **dict.fromkeys(("test", "testing"), "test_matched"),
    "mismatched": "validation_mismatched",
}


@dataclass(frozen=True)
class GlueTask:
    """The facts of one task."""

    metrics: tuple[str, ...]
    """The metrics it is reported by; a drop is about the first."""
    texts: Mapping[str, str] = field(hash=False)
    """Text columns: the hub's name -> that in GLUE's own files."""
    label: str = "label"
    """The column of the label in GLUE's own files."""
    classes: tuple[str, ...] = ()
    """The hub's names of the classes, in the order of their numbers; none where the label is a score."""
    headless: tuple[str, ...] = ()
    """Columns of the files that have no header."""
    splits: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Names of splits that GLUE calls otherwise."""


def _same(*texts: str) -> dict[str, str]:
    return dict(zip(texts, texts, strict=True))


_PAIR = _same("sentence1", "sentence2")
TASKS = {
    "cola": GlueTask(
        ("matthews",),
        _same("sentence"),
        "is_acceptable",
        ("unacceptable", "acceptable"),
        headless=("source", "is_acceptable", "mark", "sentence"),
    ),
    "sst2": GlueTask(("accuracy",), _same("sentence"), classes=("negative", "positive")),
    "mrpc": GlueTask(
        ("f1", "accuracy"),
        {"sentence1": "#1 String", "sentence2": "#2 String"},
        "Quality",
        ("not_equivalent", "equivalent"),
    ),
    "qqp": GlueTask(
        ("f1", "accuracy"),
        _same("question1", "question2"),
        "is_duplicate",
        ("not_duplicate", "duplicate"),
    ),
    "stsb": GlueTask(("spearman", "pearson"), _PAIR, "score"),
    "mnli": GlueTask(
        ("accuracy",),
        {"premise": "sentence1", "hypothesis": "sentence2"},
        "gold_label",
        ("entailment", "neutral", "contradiction"),
        splits=_MATCHED,
    ),
    "qnli": GlueTask(("accuracy",), _same("question", "sentence"), classes=("entailment", "not_entailment")),
    "rte": GlueTask(("accuracy",), _PAIR, classes=("entailment", "not_entailment")),
    "wnli": GlueTask(("accuracy",), _PAIR, classes=("not_entailment", "entailment")),
}
_OTHERS = ("ax", "mnli_matched", "mnli_mismatched")  # of the hub's data set; they have a split or two alone


def glue_task(spec: str, config: str | None) -> GlueTask | None:
    """The task that data is of: `glue/NAME`, `glue` with a config, or a folder whose path ends in glue/NAME or
    glue_data/NAME."""
    home, name = _parts(spec, config)
    return TASKS.get(name) if home in _FOLDERS else None


def config_of(spec: str, config: str | None) -> str:
    """The hub's config of `glue/NAME`. Raises `UsageError` for a name that GLUE doesn't have."""
    _, name = _parts(spec, config)
    if name not in TASKS and name not in _OTHERS:
        raise UsageError(
            f"GLUE has no task {name!r}", f"it has {', '.join(TASKS)}: {param('data', meta='glue/rte')}"
        )
    return name


def _parts(spec: str, config: str | None) -> tuple[str, str]:
    """`SST-2` and `sts-b` are also how people write them."""
    parts = PurePath(spec).parts
    if config is None and len(parts) > 1:
        home, name = parts[-2], parts[-1]
    else:
        home, name = parts[-1] if parts else "", config or ""
    return home.lower(), name.lower().replace("-", "")


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
