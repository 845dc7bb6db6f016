"""What a model is for: which class opens it, and what its output is.

An output is always a tensor [batch, rows, classes] with a weight for each row, so that the losses need no case
for each task: one row for a classifier or an embedding, one for each token of a tagger, two (start and end)
for question answering.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optin_cli.errors import UsageError

SEQUENCE = "sequence-classification"
TOKEN = "token-classification"
QUESTION = "question-answering"
IMAGE = "image-classification"
EMBEDDING = "embedding"

AUTO_CLASSES = {
    SEQUENCE: "AutoModelForSequenceClassification",
    TOKEN: "AutoModelForTokenClassification",
    QUESTION: "AutoModelForQuestionAnswering",
    IMAGE: "AutoModelForImageClassification",
    EMBEDDING: "AutoModel",
}
_SUFFIXES = {
    "ForSequenceClassification": SEQUENCE,
    "ForTokenClassification": TOKEN,
    "ForQuestionAnswering": QUESTION,
    "ForImageClassification": IMAGE,
    "ForImageClassificationWithTeacher": IMAGE,
}

PROJECTED = "WithProjection"
"""Ends the names of classes whose embedding is a projection into a space that two towers share."""
_PROJECTIONS = ("image_embeds", "text_embeds")

Inputs = Mapping[str, Tensor]
Forward = Callable[..., Any]


@dataclass(frozen=True)
class Task:
    """How to read a model's output. `regression` marks values compared by squared error instead of KL."""

    name: str
    regression: bool = False
    pooling: str = "mean"
    """For embeddings: `mean` over the tokens, `cls` (the first token), or `none` (already one vector)."""

    def output(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """Run `model`: float32 [batch, rows, classes] of logits, values or a unit-length embedding."""
        result = model(**inputs)
        if self.name == QUESTION:
            logits = torch.stack([result.start_logits, result.end_logits], dim=1)  # (b, 2, s)
            mask = inputs.get("attention_mask")
            if mask is not None:
                logits = logits.masked_fill(mask[:, None, :] == 0, -1e4)
            return logits.float()
        if self.name == EMBEDDING:
            return self._embedding(result, inputs.get("attention_mask"))[:, None, :]
        logits = result if isinstance(result, Tensor) else result.logits
        return logits.float() if self.name == TOKEN else logits.float()[:, None, :]

    def row_weights(self, inputs: Inputs) -> Tensor:
        """Weight of each output row, [batch, rows]: padding tokens of a tagger count nothing."""
        if self.name == TOKEN and "attention_mask" in inputs:
            return inputs["attention_mask"].float()
        first = next(iter(inputs.values()))
        rows = {TOKEN: first.shape[1], QUESTION: 2}.get(self.name, 1)
        return torch.ones(first.shape[0], rows, device=first.device)

    def _embedding(self, result: Any, attention_mask: Tensor | None) -> Tensor:
        """Unit-length sentence (or image) vectors, [batch, hidden]."""
        hidden = (result if isinstance(result, Tensor) else _hidden_or_projection(result)).float()
        if hidden.dim() == 2 or self.pooling == "none":
            pooled = hidden
        elif self.pooling == "cls":
            pooled = hidden[:, 0]
        elif attention_mask is None:
            pooled = hidden.mean(dim=1)
        else:
            weight = attention_mask[..., None].float()  # (b, s, 1)
            pooled = (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
        return nn.functional.normalize(pooled, dim=-1)


def _hidden_or_projection(result: Any) -> Tensor:
    """Hidden states [batch, tokens, hidden], or [batch, dim] where the model projects them itself."""
    projections = (getattr(result, name, None) for name in _PROJECTIONS)
    return next((p for p in projections if p is not None), result.last_hidden_state)


def task_from_config(config: Any, folder: Path | None, override: str | None) -> Task:
    """The task of a transformers model, from `config.architectures` unless `override` names one.

    A bare encoder, or one with a language-modelling head, is an embedding model.
    """
    if override is not None and override not in AUTO_CLASSES:
        raise UsageError(f"unknown task {override!r}", f"choose one of {', '.join(AUTO_CLASSES)}")
    architecture = (getattr(config, "architectures", None) or [""])[0]
    name = override or next(
        (task for suffix, task in _SUFFIXES.items() if architecture.endswith(suffix)), EMBEDDING
    )
    if name == EMBEDDING:
        return Task(EMBEDDING, regression=True, pooling=_pooling(folder))
    one_logit = name == SEQUENCE and getattr(config, "num_labels", 2) == 1
    return Task(name, regression=one_logit)


def _pooling(folder: Path | None) -> str:
    """The pooling that the sentence-transformers files of a model ask for; mean when there are none."""
    path = folder / "1_Pooling" / "config.json" if folder else None
    if path is None or not path.is_file():
        return "mean"
    settings = json.loads(path.read_text())
    return "cls" if settings.get("pooling_mode_cls_token") else "mean"
