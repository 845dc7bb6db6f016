"""The tasks of GLUE (Wang et al. 2019) by name: which split is the validation set, and which metrics count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath

from optin_cli.errors import UsageError

HOME = "nyu-mll/glue"
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
    splits: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Names of splits that GLUE calls otherwise."""


TASKS = {
    "cola": GlueTask(("matthews",)),
    "sst2": GlueTask(("accuracy",)),
    "mrpc": GlueTask(("f1", "accuracy")),
    "qqp": GlueTask(("f1", "accuracy")),
    "stsb": GlueTask(("spearman", "pearson")),
    "mnli": GlueTask(("accuracy",), _MATCHED),
    "qnli": GlueTask(("accuracy",)),
    "rte": GlueTask(("accuracy",)),
    "wnli": GlueTask(("accuracy",)),
}
_OTHERS = ("ax", "mnli_matched", "mnli_mismatched")  # of the hub's data set; they have a split or two alone


def glue_task(spec: str, config: str | None) -> GlueTask | None:
    """The task that data is of: `glue/NAME`, `glue` with a config, or a folder whose path ends in glue/NAME."""
    home, name = _parts(spec, config)
    return TASKS.get(name) if home == "glue" else None


def config_of(spec: str, config: str | None) -> str:
    """The hub's config of `glue/NAME`. Raises `UsageError` for a name that GLUE doesn't have."""
    _, name = _parts(spec, config)
    if name not in TASKS and name not in _OTHERS:
        raise UsageError(f"GLUE has no task {name!r}", f"it has {', '.join(TASKS)}: --data glue/rte")
    return name


def _parts(spec: str, config: str | None) -> tuple[str, str]:
    """`SST-2` and `sts-b` are also how people write them."""
    parts = PurePath(spec).parts
    if config is None and len(parts) > 1:
        home, name = parts[-2], parts[-1]
    else:
        home, name = parts[-1] if parts else "", config or ""
    return home.lower(), name.lower().replace("-", "")
