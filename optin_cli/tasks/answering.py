"""Where in a text a question is answered: extractive question answering."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optin_cli.data.batches import Batch, Batches
from optin_cli.tasks.base import Forward, Inputs, Task, ones

QUESTION = "question-answering"
_IMPOSSIBLE = -1e4


@dataclass(frozen=True)
class QuestionAnswering(Task):
    """The first and the last token of the answer: two rows, whose classes are the tokens."""

    name = QUESTION
    auto_class = "AutoModelForQuestionAnswering"
    architectures = ("ForQuestionAnswering",)

    def output(self, model: Forward, inputs: Inputs) -> Tensor:
        result = model(**inputs)
        logits = torch.stack([result.start_logits, result.end_logits], dim=1)  # (b, 2, s)
        mask = inputs.get("attention_mask")
        if mask is not None:
            logits = logits.masked_fill(mask[:, None, :] == 0, _IMPOSSIBLE)
        return logits.float()

    def row_weights(self, inputs: Inputs) -> Tensor:
        return ones(inputs, 2)

    def labels(self, batches: Batches) -> None:
        return None

    def needed(self, batches: Batches) -> str:
        return "the answers that question answering is labelled with"

    def keep(self, batch: Batch, output: Tensor, weights: Tensor, labels: Any) -> list[Any]:
        return [None] * len(batch)

    def metrics(self, kept: Sequence[Any], labels: Any, batches: Batches) -> dict[str, float]:
        return {}
