"""The next token of a running text: what a decoder was trained for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optin_cli.data.batches import IGNORE, Batch, Batches
from optin_cli.data.readers import RUNNING_TEXT
from optin_cli.tasks import metrics
from optin_cli.tasks.base import Forward, Inputs, Task, logits_of, ones

LANGUAGE = "language-modeling"

_ROWS = 16
"""Of a window, so many tokens' predictions are compared while scoring: a row has a logit for each word there is."""
_LOGITS = 1 << 24
"""Logits of one call while measuring, of more than one window."""


@dataclass
class TokenPredictions:
    """Predictions of the tokens of one window."""

    nats: float
    """Sum of their negative log likelihoods."""
    right: int
    count: int


@dataclass(frozen=True)
class NextToken(Task):
    """A row for each token, whose classes are the tokens that may follow. Labels are, row by row, those that do."""

    main: ClassVar[tuple[str, ...]] = ("perplexity",)
    sampled = True

    @classmethod
    def from_config(cls, config: Any, folder: Path | None) -> Task:
        decoder = getattr(config, "decoder", None)  # of a model that is made of two
        return cls(classes=getattr(config, "vocab_size", getattr(decoder, "vocab_size", 0)))

    @property
    def slots(self) -> int | None:
        return max(1, _LOGITS // max(1, self.classes))

    def targets(self, batches: Batches) -> Any:
        """Return the labels; a text is the label, and need not vary as classes do."""
        return self.labels(batches)

    def keep(self, batch: Batch, output: Tensor, weights: Tensor, labels: Any) -> list[Any]:
        if labels is None:
            return [None] * len(batch)
        found = []
        for logits, example in zip(output, batch.example_ids, strict=True):
            wanted = torch.tensor(labels[example], device=logits.device)
            logits = logits[: len(wanted)]
            nats = F.cross_entropy(logits, wanted, reduction="sum") if len(wanted) else 0.0
            right, count = int((logits.argmax(-1) == wanted).sum()), int((wanted != IGNORE).sum())
            found.append(TokenPredictions(float(nats), right, count))
        return found

    def metrics(self, kept: Sequence[Any], labels: Any, batches: Batches) -> dict[str, float]:
        """`perplexity`, e to the mean negative log likelihood of a token, and next-token `accuracy` (points)."""
        return metrics.prediction(
            sum(one.nats for one in kept), sum(one.right for one in kept), sum(one.count for one in kept),
            batches.examples.where,
        )  # fmt: skip

    def compare(self, output: Tensor, baseline: Tensor, weights: Tensor) -> dict[str, float]:
        """Window by window: the logits of many would be large in float64."""
        sums: dict[str, float] = {}
        for ours, dense, weight in zip(output, baseline, weights, strict=True):
            for name, value in super().compare(ours, dense, weight).items():
                sums[name] = sums.get(name, 0.0) + value
        return sums

    def lost(self, metric: str, ours: float, baseline: float) -> float:
        """Return how many per cent the perplexity rises; of other metrics, points."""
        return 100 * (ours / baseline - 1) if metric == "perplexity" else super().lost(metric, ours, baseline)


@dataclass(frozen=True)
class LanguageModeling(NextToken):
    """Causal language modelling: each token of a running text after those before it."""

    name = LANGUAGE
    auto_class = "AutoModelForCausalLM"
    architectures = ("ForCausalLM", "LMHeadModel")
    reader = RUNNING_TEXT

    def output(self, model: Forward, inputs: Inputs) -> Tensor:
        """Logits after evenly spaced tokens alone: those of all would be larger than the model."""
        return logits_at(model, inputs, spaced(inputs["input_ids"].shape[1])).float()

    def row_weights(self, inputs: Inputs) -> Tensor:
        """Padding counts nothing."""
        return _mask(inputs)[:, spaced(inputs["input_ids"].shape[1])]

    def full_output(self, model: Forward, inputs: Inputs) -> Tensor:
        return logits_of(model(**inputs)).float()

    def full_weights(self, inputs: Inputs) -> Tensor:
        return _mask(inputs)

    def labels(self, batches: Batches) -> list[list[int]]:
        """Return the labels: the tokens of each window but the first."""
        return [row["input_ids"][1:] for row in batches.encoded.inputs]

    def loss(self, output: Tensor, labels: Sequence[Any]) -> Tensor:
        """The mean negative log likelihood of what follows the spaced tokens of each window."""
        longest = 1 + max(map(len, labels))  # tokens of a window in this call
        return mean_nats(output, padded(labels, longest)[:, spaced(longest)])


def logits_at(model: Forward, inputs: Inputs, rows: Tensor | slice) -> Tensor:
    """The logits of some `rows`, [batch, rows, classes]: the head is given those alone.

    The whole of what the model computes is cut where its head is not a layer that it calls (an exported file, a head
    that multiplies with weights of others).
    """
    embeddings = getattr(model, "get_output_embeddings", None)
    head = embeddings() if embeddings else None
    cut = False

    def choose(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal cut
        cut = True
        return (_at(args[0], rows), *args[1:])

    handle = head.register_forward_pre_hook(choose) if isinstance(head, nn.Module) else None
    try:
        result = model(**inputs)
    finally:
        if handle is not None:
            handle.remove()
    pretraining = not isinstance(result, Tensor) and not hasattr(result, "logits")
    logits = result.prediction_logits if pretraining else logits_of(result)
    return logits if cut else _at(logits, rows)


def _at(values: Tensor, rows: Tensor | slice) -> Tensor:
    return values[:, rows.to(values.device) if isinstance(rows, Tensor) else rows]


def padded(labels: Sequence[Sequence[int]], rows: int) -> Tensor:
    """Labels as [examples, rows], `IGNORE` where there is none."""
    return torch.tensor([[*row, *[IGNORE] * (rows - len(row))][:rows] for row in labels])


def mean_nats(output: Tensor, wanted: Tensor) -> Tensor:
    """The mean negative log likelihood of each example's labels, (examples,)."""
    wanted = wanted.to(output.device)
    losses = F.cross_entropy(output.transpose(1, 2), wanted, ignore_index=IGNORE, reduction="none")
    return losses.sum(1) / (wanted != IGNORE).sum(1).clamp(min=1)


def spaced(tokens: int) -> Tensor:
    """At most 16 evenly spaced positions of a window of so many tokens, the first among them, not the last."""
    if tokens <= _ROWS:
        return torch.arange(tokens)
    return torch.arange(_ROWS) * tokens // _ROWS


def _mask(inputs: Inputs) -> Tensor:
    mask = inputs.get("attention_mask")
    return ones(inputs, inputs["input_ids"].shape[1]) if mask is None else mask.float()
