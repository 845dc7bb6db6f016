"""One output for a whole example: classes of texts and images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from optin_cli.data.batches import Batches
from optin_cli.tasks import metrics
from optin_cli.tasks.base import Task
from optin_cli.tasks.multilabel import ImageMultiLabel, MultiLabel
from optin_cli.tasks.regression import ImageRegression, Regression

SEQUENCE = "sequence-classification"
IMAGE = "image-classification"
_TEXTS: dict[Any, type[Task]] = {task.problem: task for task in (Regression, MultiLabel)}
_IMAGES: dict[Any, type[Task]] = {task.problem: task for task in (ImageRegression, ImageMultiLabel)}


@dataclass(frozen=True)
class SequenceClassification(Task):
    """Classes of texts or of pairs of texts."""

    name = SEQUENCE
    auto_class = "AutoModelForSequenceClassification"
    architectures = ("ForSequenceClassification", "ForNextSentencePrediction")

    @classmethod
    def from_config(cls, config: Any, folder: Path | None) -> Task:
        """Values (a single logit is one) and several labels at once are separate tasks."""
        single = Regression if getattr(config, "num_labels", 2) == 1 else cls
        return _TEXTS.get(getattr(config, "problem_type", None), single)._of_classes(config)


@dataclass(frozen=True)
class ImageClassification(Task):
    """Classes of images."""

    name = IMAGE
    auto_class = "AutoModelForImageClassification"
    architectures = ("ForImageClassification", "ForImageClassificationWithTeacher")
    main = ("top1",)

    @classmethod
    def from_config(cls, config: Any, folder: Path | None) -> Task:
        return _IMAGES.get(getattr(config, "problem_type", None), cls)._of_classes(config)

    def metrics(self, kept: Sequence[Any], labels: Any, batches: Batches) -> dict[str, float]:
        return metrics.classification(torch.stack(list(kept)).numpy(), labels, images=True)
