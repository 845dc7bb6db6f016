"""Several labels at once: each is on or off by itself (`problem_type` multi_label_classification)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from optin_cli.data.batches import Batches
from optin_cli.data.labels import check_range, check_varied, class_labels, ordered_columns
from optin_cli.data.numbering import numbering
from optin_cli.data.readers import LABELS
from optin_cli.errors import InputError
from optin_cli.tasks import metrics
from optin_cli.tasks.base import Task
from optin_cli.tasks.divergence import BINARY_KL, binary_kl


@dataclass(frozen=True)
class MultiLabel(Task):
    """Labels of texts; data has a list of labels for each row, or a column for each label."""

    name = "sequence-classification"
    auto_class = "AutoModelForSequenceClassification"
    architectures = ()
    reader = LABELS
    term = BINARY_KL
    main = ("micro_f1",)

    def labels(self, batches: Batches) -> np.ndarray | None:
        """[rows, labels] of 0 and 1."""
        columns, where = batches.examples.columns, batches.examples.where
        if columns.labels:
            return self._from_columns(batches)
        if columns.label is None:
            return None
        values = batches.examples.rows[columns.label][:]
        if odd := [value for value in values if not isinstance(value, list)]:
            raise InputError(
                f"{where} has the label {str(odd[0])[:40]!r}, but the model has several labels at once",
                "give a column of lists of labels, or a column of 0 and 1 for each of them (--label A,B,C)",
            )
        if all(len(value) == self.classes and set(value) <= {0, 1} for value in values) and self.classes > 2:
            return np.array(values, dtype=np.int64)  # one number a label already
        feature = batches.examples.rows.features[columns.label]
        number = numbering(values, feature, self.label2id, batches.examples.data.spec)
        found = np.zeros((len(values), self.classes), np.int64)
        for row, value in enumerate(values):
            numbers = class_labels([number(label) for label in value], where)
            check_range(numbers, self.classes, where)
            found[row, numbers] = 1
        return found

    def _from_columns(self, batches: Batches) -> np.ndarray:
        """[rows, labels], from a column for each label."""
        where = batches.examples.where
        columns = ordered_columns(batches.examples.columns.labels, self.label2id, self.classes)
        values = [class_labels(batches.examples.rows[name][:], where) for name in columns]
        check_range([value for column in values for value in column], 2, where)
        return np.array(values).T

    def targets(self, batches: Batches) -> np.ndarray | None:
        labels = self.labels(batches)
        if labels is not None:
            check_varied(labels.flatten().tolist(), batches.examples.where)
        return labels

    def loss(self, output: Tensor, labels: Sequence[Any]) -> Tensor:
        """The mean binary cross-entropy of the labels."""
        wanted = torch.tensor(np.array(labels), dtype=output.dtype, device=output.device)
        return F.binary_cross_entropy_with_logits(output[:, 0], wanted, reduction="none").mean(-1)

    def metrics(self, kept: Sequence[Any], labels: Any, batches: Batches) -> dict[str, float]:
        return metrics.multi_label(torch.stack(list(kept)).numpy(), labels)

    def compare(self, output: Tensor, baseline: Tensor, weights: Tensor) -> dict[str, float]:
        """Agreement is that of single labels."""
        ours, dense = output[weights > 0], baseline[weights > 0]  # (examples, labels)
        same = float(((ours > 0) == (dense > 0)).double().mean(-1).sum())
        return {"rows": len(ours), "agreement": 100 * same, "kl": float(binary_kl(dense, ours).sum())}


@dataclass(frozen=True)
class ImageMultiLabel(MultiLabel):
    """Labels of images."""

    name = "image-classification"
    auto_class = "AutoModelForImageClassification"


def has_many(config: Any) -> bool:
    """Whether a model's labels are on or off each by itself."""
    return getattr(config, "problem_type", None) == "multi_label_classification"
