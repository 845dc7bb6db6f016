"""One value or several of a whole example (one logit, or `problem_type` regression)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optin_cli.data.batches import Batches
from optin_cli.data.labels import check_varied, number_labels, ordered_columns
from optin_cli.data.numbering import numbering
from optin_cli.data.readers import LABELS
from optin_cli.errors import InputError
from optin_cli.tasks import metrics
from optin_cli.tasks.base import Task
from optin_cli.tasks.divergence import SQUARES


@dataclass(frozen=True)
class Regression(Task):
    """Values of texts; data has a number for each row, a list of them, or a column for each value."""

    name = "sequence-classification"
    auto_class = "AutoModelForSequenceClassification"
    architectures = ()
    reader = LABELS
    term = SQUARES
    main = ("spearman",)

    def labels(self, batches: Batches) -> np.ndarray | None:
        """[rows, values], in the order of the model's outputs."""
        columns, where = batches.examples.columns, batches.examples.where
        if columns.labels:
            names = ordered_columns(columns.labels, self.label2id, self.classes)
            return np.array([self._numbers(batches, name) for name in names]).T
        if columns.label is None:
            return None
        values = batches.examples.rows[columns.label][:]
        if not any(isinstance(value, list) for value in values):
            if self.classes > 1:
                raise InputError(
                    f"{where} has one number a row, but the model gives {self.classes}",
                    "give a column of lists of numbers, or a column for each value (--label A,B,C)",
                )
            return np.array(self._numbers(batches, columns.label))[:, None]
        if odd := [value for value in values if not isinstance(value, list) or len(value) != self.classes]:
            raise InputError(
                f"{where} has the label {str(odd[0])[:40]}, but the model gives {self.classes} values",
                "give a list of as many numbers for each row, or name another column with --label",
            )
        flat = number_labels([number for value in values for number in value], where)
        return np.array(flat).reshape(len(values), self.classes)

    def _numbers(self, batches: Batches, column: str) -> list[float]:
        """A column of numbers, perhaps written as text."""
        rows = batches.examples.rows
        number = numbering(rows[column][:], rows.features[column], {}, batches.examples.data.spec)
        return number_labels([number(value) for value in rows[column][:]], batches.examples.where)

    def targets(self, batches: Batches) -> np.ndarray | None:
        labels = self.labels(batches)
        if labels is not None:
            check_varied(labels.flatten().tolist(), batches.examples.where)
        return labels

    def loss(self, output: Tensor, labels: Sequence[Any]) -> Tensor:
        """Squared error, the mean over the values."""
        wanted = torch.tensor(np.array(labels), dtype=output.dtype, device=output.device)
        return (output[:, 0] - wanted).square().mean(-1)

    def metrics(self, kept: Sequence[Any], labels: Any, batches: Batches) -> dict[str, float]:
        return metrics.regression(torch.stack(list(kept)).numpy(), labels, batches.examples.where)

    def compare(self, output: Tensor, baseline: Tensor, weights: Tensor) -> dict[str, float]:
        return {}

    def fidelity(
        self, sums: Mapping[str, float], ours: Sequence[Any], theirs: Sequence[Any], device: torch.device
    ) -> dict[str, float]:
        """In units of the label."""
        mine, dense = (torch.stack(list(side)).numpy() for side in (ours, theirs))
        return {"mean_abs_difference": float(np.abs(mine - dense).mean())}


@dataclass(frozen=True)
class ImageRegression(Regression):
    """Values of images."""

    name = "image-classification"
    auto_class = "AutoModelForImageClassification"


def gives_values(config: Any) -> bool:
    """Whether a model's outputs are values and no classes."""
    return getattr(config, "problem_type", None) == "regression"
