"""One value or several of a whole example (one logit, or `problem_type` regression)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optin_cli.data.batches import Batches
from optin_cli.data.label_ids import numbering
from optin_cli.data.labels import number_labels
from optin_cli.errors import InputError, param
from optin_cli.tasks import metrics
from optin_cli.tasks.divergence import SQUARES
from optin_cli.tasks.multi_output import MultiOutputTask, OfImages


@dataclass(frozen=True)
class Regression(MultiOutputTask):
    """Values of texts; a single one may be a plain number in each row."""

    problem = "regression"
    term = SQUARES
    main = ("spearman",)

    def _from_columns(self, batches: Batches, names: list[str]) -> list[list[float]]:
        return [self._numbers(batches, name) for name in names]

    def _from_rows(self, batches: Batches, name: str) -> np.ndarray:
        values, where = batches.examples.rows[name][:], batches.examples.where
        if not any(isinstance(value, list) for value in values):
            if self.classes > 1:
                raise InputError(
                    f"{where} has one number a row, but the model gives {self.classes}",
                    f"give a column of lists of numbers, or a column for each value ({param('label', meta='A,B,C')})",
                )
            return np.array(self._numbers(batches, name))[:, None]
        if odd := [value for value in values if not isinstance(value, list) or len(value) != self.classes]:
            raise InputError(
                f"{where} has the label {str(odd[0])[:40]}, but the model gives {self.classes} values",
                f"give a list of as many numbers for each row, or name another column with {param('label')}",
            )
        flat = number_labels([number for value in values for number in value], where)
        return np.array(flat).reshape(len(values), self.classes)

    def _numbers(self, batches: Batches, column: str) -> list[float]:
        """A column of numbers, perhaps written as text."""
        rows = batches.examples.rows
        number = numbering(rows[column][:], rows.features[column], {}, batches.examples.data.spec)
        return number_labels([number(value) for value in rows[column][:]], batches.examples.where)

    def _losses(self, output: Tensor, wanted: Tensor) -> Tensor:
        return (output - wanted).square()

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
class ImageRegression(OfImages, Regression):
    """Values of images."""
