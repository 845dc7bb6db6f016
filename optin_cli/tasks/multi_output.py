"""Tasks with several labels of a whole example, each a separate output: the base of values and switches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from optin_cli.data.batches import Batches
from optin_cli.data.labels import check_varied, ordered_columns
from optin_cli.data.readers import LABELS
from optin_cli.tasks.base import Task


@dataclass(frozen=True)
class MultiOutputTask(Task, ABC):
    """Labels of texts; data has a list of them for each row, or a column for each label."""

    problem: ClassVar[str]
    """The name in a config (`problem_type`)."""

    name = "sequence-classification"
    auto_class = "AutoModelForSequenceClassification"
    architectures = ()
    reader = LABELS

    def labels(self, batches: Batches) -> np.ndarray | None:
        """[rows, labels], in the order of the model's outputs."""
        columns = batches.examples.columns
        if columns.labels:
            names = ordered_columns(columns.labels, self.label2id, self.classes)
            return np.array(self._from_columns(batches, names)).T
        return None if columns.label is None else self._from_rows(batches, columns.label)

    @abstractmethod
    def _from_columns(self, batches: Batches, names: list[str]) -> list[list[Any]]:
        """The checked numbers of each column."""

    @abstractmethod
    def _from_rows(self, batches: Batches, name: str) -> np.ndarray:
        """[rows, labels], checked, from one column."""

    def targets(self, batches: Batches) -> np.ndarray | None:
        labels = self.labels(batches)
        if labels is not None:
            check_varied(labels.flatten().tolist(), batches.examples.where)
        return labels

    def loss(self, output: Tensor, labels: Sequence[Any]) -> Tensor:
        """The mean over the labels."""
        wanted = torch.tensor(np.array(labels), dtype=output.dtype, device=output.device)
        return self._losses(output[:, 0], wanted).mean(-1)

    @abstractmethod
    def _losses(self, output: Tensor, wanted: Tensor) -> Tensor:
        """The loss of each label, (examples, labels)."""


class OfImages:
    """Turns a task of texts into the same of images."""

    name = "image-classification"
    auto_class = "AutoModelForImageClassification"
