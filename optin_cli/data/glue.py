"""The tasks of GLUE (Wang et al. 2019) by name: columns, classes, which split is the validation set, and which
metrics count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath

from optin_cli.errors import UsageError, param

HOME = "nyu-mll/glue"
HIDDEN = -1
"""What test splits hold instead of labels."""
_FOLDERS = ("glue", "glue_data")
"""What holds the folders of the tasks; the second is what GLUE's own download makes."""
_MATCHED = {
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation_matched"),
    **dict.fromkeys(("test", "testing"), "test_matched"),
    "mismatched": "validation_mismatched",
}


@dataclass(frozen=True)
class GlueTask:
    """What is special about a task."""

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
