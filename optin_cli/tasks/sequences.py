"""One output for a whole example: classes of texts and images, and values of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optin_cli.data.batches import Batches
from optin_cli.data.labels import number_labels
from optin_cli.tasks import metrics
from optin_cli.tasks.base import Task
from optin_cli.tasks.divergence import SQUARES
from optin_cli.tasks.multilabel import ImageMultiLabel, MultiLabel, has_many

SEQUENCE = "sequence-classification"
IMAGE = "image-classification"


@dataclass(frozen=True)
class SequenceClassification(Task):
    """Classes of texts or of pairs of texts."""

    name = SEQUENCE
    auto_class = "AutoModelForSequenceClassification"
    architectures = ("ForSequenceClassification",)

    @classmethod
    def from_config(cls, config: Any, folder: Path | None) -> Task:
        """A model with one logit gives values; one for several labels at once has a task of its own."""
        if has_many(config):
            return MultiLabel._of_classes(config)
        if getattr(config, "num_labels", 2) == 1:
            return SequenceRegression()
        return cls._of_classes(config)


@dataclass(frozen=True)
class SequenceRegression(Task):
    """A value of each text or pair of texts."""

    name = SEQUENCE
    auto_class = "AutoModelForSequenceClassification"
    architectures = ()
    term = SQUARES
    main = ("spearman",)

    def labels(self, batches: Batches) -> list[float] | None:
        labels = batches.labels()
        return None if labels is None else number_labels(labels, batches.examples.where)

    def loss(self, output: Tensor, labels: Sequence[Any]) -> Tensor:
        """Squared error."""
        return (output[:, 0, 0] - torch.tensor(labels, device=output.device)).square()

    def metrics(self, kept: Sequence[Any], labels: Any, batches: Batches) -> dict[str, float]:
        return metrics.correlation(torch.cat(list(kept)).numpy(), labels, batches.examples.where)

    def compare(self, output: Tensor, baseline: Tensor, weights: Tensor) -> dict[str, float]:
        return {}

    def fidelity(
        self, sums: Mapping[str, float], ours: Sequence[Any], theirs: Sequence[Any], device: torch.device
    ) -> dict[str, float]:
        """In units of the label."""
        mine, dense = (torch.stack(list(side)).numpy() for side in (ours, theirs))
        return {"mean_abs_difference": float(np.abs(mine - dense).mean())}


@dataclass(frozen=True)
class ImageClassification(Task):
    """Classes of images."""

    name = IMAGE
    auto_class = "AutoModelForImageClassification"
    architectures = ("ForImageClassification", "ForImageClassificationWithTeacher")
    main = ("top1",)

    @classmethod
    def from_config(cls, config: Any, folder: Path | None) -> Task:
        return (ImageMultiLabel if has_many(config) else cls)._of_classes(config)

    def metrics(self, kept: Sequence[Any], labels: Any, batches: Batches) -> dict[str, float]:
        return metrics.classification(torch.stack(list(kept)).numpy(), labels, images=True)
