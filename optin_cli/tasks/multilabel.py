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
from optin_cli.data.label_ids import numbering
from optin_cli.data.labels import check_range, class_labels
from optin_cli.errors import InputError, param
from optin_cli.tasks import metrics
from optin_cli.tasks.divergence import BINARY_KL, binary_kl
from optin_cli.tasks.multi_output import MultiOutputTask, OfImages


@dataclass(frozen=True)
class MultiLabel(MultiOutputTask):
    """Labels of texts, 0 or 1; a list names those that are on, or has a number for each."""

    problem = "multi_label_classification"
    term = BINARY_KL
    main = ("micro_f1",)

    def _from_columns(self, batches: Batches, names: list[str]) -> list[list[int]]:
        where = batches.examples.where
        values = [class_labels(batches.examples.rows[name][:], where) for name in names]
        check_range([value for column in values for value in column], 2, where)
        return values

    def _from_rows(self, batches: Batches, name: str) -> np.ndarray:
        values, where = batches.examples.rows[name][:], batches.examples.where
        if odd := [value for value in values if not isinstance(value, list)]:
            raise InputError(
                f"{where} has the label {str(odd[0])[:40]!r}, but the model has several labels at once",
                f"give a column of lists of labels, or a column of 0 and 1 for each of them "
                f"({param('label', meta='A,B,C')})",
            )
        if all(len(value) == self.classes and set(value) <= {0, 1} for value in values) and self.classes > 2:
            return np.array(values, dtype=np.int64)  # one number a label already
        feature = batches.examples.rows.features[name]
        number = numbering(values, feature, self.label2id, batches.examples.data.spec)
        found = np.zeros((len(values), self.classes), np.int64)
        for row, value in enumerate(values):
            numbers = class_labels([number(label) for label in value], where)
            check_range(numbers, self.classes, where)
            found[row, numbers] = 1
        return found

    def _losses(self, output: Tensor, wanted: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(output, wanted, reduction="none")

    def metrics(self, kept: Sequence[Any], labels: Any, batches: Batches) -> dict[str, float]:
        return metrics.multi_label(torch.stack(list(kept)).numpy(), labels)

    def compare(self, output: Tensor, baseline: Tensor, weights: Tensor) -> dict[str, float]:
        """Agreement is that of single labels."""
        ours, dense = output[weights > 0], baseline[weights > 0]  # (examples, labels)
        same = float(((ours > 0) == (dense > 0)).double().mean(-1).sum())
        return {"rows": len(ours), "agreement": 100 * same, "kl": float(binary_kl(dense, ours).sum())}


@dataclass(frozen=True)
class ImageMultiLabel(OfImages, MultiLabel):
    """Labels of images."""
