"""A class for each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from optin_cli.data.batches import IGNORE, Batch, Batches
from optin_cli.data.label_ids import class_names
from optin_cli.data.labels import token_labels
from optin_cli.tasks import metrics
from optin_cli.tasks.base import Forward, Inputs, Task, logits_of, ones
from optin_cli.tasks.metrics import are_tags, entity_f1

TOKEN = "token-classification"


@dataclass(frozen=True)
class TokenClassification(Task):
    """A class for each token; data has one for each word, which its first token gets."""

    name = TOKEN
    auto_class = "AutoModelForTokenClassification"
    architectures = ("ForTokenClassification",)
    main = ("entity_f1", "accuracy")

    def output(self, model: Forward, inputs: Inputs) -> Tensor:
        return logits_of(model(**inputs)).float()

    def row_weights(self, inputs: Inputs) -> Tensor:
        """Padding counts nothing."""
        mask = inputs.get("attention_mask")
        return ones(inputs, next(iter(inputs.values())).shape[1]) if mask is None else mask.float()

    def numbered(self, labels: Sequence[Any], where: str) -> list[Any]:
        """One list a row, aligned to tokens, `IGNORE` where no word begins."""
        return token_labels(labels, where)

    def loss(self, output: Tensor, labels: Sequence[Any]) -> Tensor:
        """The mean cross-entropy over the labelled tokens."""
        slots = output.shape[1]
        wanted = torch.tensor([(row + [IGNORE] * slots)[:slots] for row in labels], device=output.device)
        losses = F.cross_entropy(output.transpose(1, 2), wanted, ignore_index=IGNORE, reduction="none")
        return losses.sum(1) / (wanted != IGNORE).sum(1).clamp(min=1)

    def keep(self, batch: Batch, output: Tensor, weights: Tensor, labels: Any) -> list[Any]:
        """The class of each real token."""
        pairs = zip(output.argmax(dim=-1), weights > 0, strict=True)
        return [row[real].cpu().numpy() for row, real in pairs]

    def metrics(self, kept: Sequence[Any], labels: Any, batches: Batches) -> dict[str, float]:
        """Of the words; where the classes are IOB tags, of the entities, too."""
        words = [np.array(row) != IGNORE for row in labels]
        guesses = [row[first] for row, first in zip(kept, words, strict=True)]
        truth = [np.array(row)[first] for row, first in zip(labels, words, strict=True)]
        found = metrics.tagging(guesses, truth)
        names = self._tags(batches)
        if not are_tags(names):
            return found
        sides = ([[names[tag] for tag in row] for row in rows] for rows in (guesses, truth))
        return {**entity_f1(*sides), **found}

    def _tags(self, batches: Batches) -> list[str]:
        """Return the names of the classes: the model's, or the data's if the model has none."""
        ours = [name for name, _ in sorted(self.label2id.items(), key=lambda item: item[1])]
        rows, label = batches.examples.rows, batches.examples.columns.label
        theirs = class_names(rows.features[label]) if label else []
        return next((names for names in (ours, theirs) if len(names) == self.classes and are_tags(names)), [])
