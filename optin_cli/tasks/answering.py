"""Extractive question answering, as in SQuAD: find the span of a text that answers a question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from optin_cli.data.batches import Batch, Batches
from optin_cli.data.readers import WINDOWS, Window
from optin_cli.errors import InputError
from optin_cli.tasks import metrics
from optin_cli.tasks.base import Forward, Inputs, Task, ones

QUESTION = "question-answering"
_IMPOSSIBLE = -1e4
_LONGEST = 30  # tokens of an answer


@dataclass
class Answers:
    """The right answers of each row, and what each window shows of its context."""

    texts: list[list[str]]
    """Of each row; none where the question can't be answered."""
    starts: list[list[int]]
    """The first character of each."""
    windows: list[Window]


@dataclass
class Span:
    """The best answer in a window."""

    score: float
    characters: tuple[int, int]
    none: float
    """The score of no answer."""


@dataclass(frozen=True)
class QuestionAnswering(Task):
    """The first and the last token of the answer: two rows, whose classes are the tokens."""

    name = QUESTION
    auto_class = "AutoModelForQuestionAnswering"
    architectures = ("ForQuestionAnswering",)
    reader = WINDOWS
    main = ("f1",)

    def output(self, model: Forward, inputs: Inputs) -> Tensor:
        result = model(**inputs)
        logits = torch.stack([result.start_logits, result.end_logits], dim=1)  # (b, 2, s)
        mask = inputs.get("attention_mask")
        if mask is not None:
            logits = logits.masked_fill(mask[:, None, :] == 0, _IMPOSSIBLE)
        return logits.float()

    def row_weights(self, inputs: Inputs) -> Tensor:
        return ones(inputs, 2)

    def labels(self, batches: Batches) -> Answers | None:
        columns, rows = batches.examples.columns, batches.examples.rows
        if columns.label is None or not batches.encoded.details:
            return None
        found = [_answers(value, batches.examples.where) for value in rows[columns.label][:]]
        return Answers(
            [texts for texts, _ in found], [starts for _, starts in found], batches.encoded.details
        )

    def targets(self, batches: Batches) -> list[tuple[int, int]] | None:
        """The first and the last token of the first answer in each window; where it is not whole, that of none."""
        answers = self.labels(batches)
        if answers is None:
            return None
        found = []
        for row, window in zip(batches.rows, answers.windows, strict=True):
            texts, starts = answers.texts[row], answers.starts[row]
            span = _tokens(window, starts[0], starts[0] + len(texts[0])) if texts else None
            found.append(span or (window.none, window.none))
        return found

    def needed(self, batches: Batches) -> str | None:
        """Return what a table of texts lacks."""
        if batches.examples.columns.label is not None:
            return None
        return "the answers that question answering is labelled with (text and answer_start)"

    def loss(self, output: Tensor, labels: Sequence[Any]) -> Tensor:
        """The mean cross-entropy of the first and the last token."""
        wanted = torch.tensor(labels, device=output.device)  # (b, 2)
        return F.cross_entropy(output.transpose(1, 2), wanted, reduction="none").mean(1)

    def keep(self, batch: Batch, output: Tensor, weights: Tensor, labels: Any) -> list[Any]:
        """The best answer of each window."""
        if labels is None:
            return [None] * len(batch)
        logits = output.cpu().numpy()
        return [best_span(logits[i], labels.windows[example]) for i, example in enumerate(batch.example_ids)]

    def metrics(self, kept: Sequence[Any], labels: Any, batches: Batches) -> dict[str, float]:
        """`exact_match` and `f1` of SQuAD. Where some questions have no answer, a model may give none, too."""
        contexts = batches.examples.rows[batches.examples.columns.text[1]][:]
        windows: list[list[Span]] = [[] for _ in contexts]
        for row, span in zip(batches.rows, kept, strict=True):
            windows[row].append(span)
        unanswerable = any(not texts for texts in labels.texts)
        predictions = []
        for context, spans in zip(contexts, windows, strict=True):
            best = max(spans, key=lambda span: span.score)
            silent = unanswerable and min(span.none for span in spans) > best.score
            start, stop = best.characters
            predictions.append("" if silent else context[start:stop])
        return metrics.squad(predictions, labels.texts)


def best_span(logits: np.ndarray, window: Window) -> Span:
    """The span of at most 30 tokens of the context with the largest start + end logit. `logits`: [2, tokens]."""
    start, end = logits[:, : len(window.offsets)].astype(np.float64)
    context = np.flatnonzero(window.offsets[:, 0] >= 0)
    none = float(start[window.none] + end[window.none])
    if not len(context):
        return Span(-np.inf, (0, 0), none)
    start, end = start[context], end[context]
    pairs = start[:, None] + end[None, :]  # (first, last)
    length = 1 + np.arange(len(end))[None, :] - np.arange(len(start))[:, None]
    pairs[(length < 1) | (length > _LONGEST)] = -np.inf
    first, last = np.unravel_index(pairs.argmax(), pairs.shape)
    characters = (int(window.offsets[context[first], 0]), int(window.offsets[context[last], 1]))
    return Span(float(pairs[first, last]), characters, none)


def _tokens(window: Window, start: int, stop: int) -> tuple[int, int] | None:
    """The tokens that hold characters `start` to `stop` of the context; None where a window does not show all."""
    shown = np.flatnonzero(window.offsets[:, 0] >= 0)
    if not len(shown) or window.offsets[shown[0], 0] > start or window.offsets[shown[-1], 1] < stop:
        return None
    within = shown[(window.offsets[shown, 1] > start) & (window.offsets[shown, 0] < stop)]
    return (int(within[0]), int(within[-1])) if len(within) else None


def _answers(value: Any, where: str) -> tuple[list[str], list[int]]:
    """Texts and first characters, from lists of both or from a list of pairs."""
    parts = value
    if isinstance(value, list) and all(isinstance(one, dict) for one in value):
        parts = {key: [one.get(key) for one in value] for key in ("text", "answer_start")}
    if not isinstance(parts, dict) or not {"text", "answer_start"} <= set(parts):
        raise InputError(
            f"{where} has the label {str(value)[:40]!r} where answers are needed",
            "a row's answers are {text: [...], answer_start: [...]}, as in SQuAD",
        )
    return list(parts["text"]), list(parts["answer_start"])
