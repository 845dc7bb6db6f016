"""The labels of the calibration examples, for the methods that need them."""

from __future__ import annotations

from typing import Any

from optin_cli.data.batches import Batches
from optin_cli.errors import UsageError, param
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.scoring.methods.registry import names_where


def read_labels(model: OpenModel, batches: Batches, method: str) -> list[Any]:
    """The label of every row of the data, as the task's loss takes it; `method` is who asks, for the errors.

    Raises `UsageError` for data and tasks without labels, `InputError` for labels that are missing, of another
    kind, or all the same.
    """
    task = model.task
    others = f"use {names_where(lambda other: not other.needs_labels)}, which need no labels"
    if needed := task.needed(batches):
        raise UsageError(
            f"{batches.examples.where} lacks what {param('method', method)} reads: {needed}", others
        )
    labels = task.targets(batches)
    if labels is None:
        raise UsageError(
            f"{batches.examples.where} has no label column, and {param('method', method)} needs labels",
            f"name one with {task.label_option}; or {others}",
        )
    return list(labels)
