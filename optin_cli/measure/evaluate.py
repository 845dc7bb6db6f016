"""How good a model is at its task, and how close it stays to the dense one. One pass over the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optin_cli.data.batches import Batch, Batches
from optin_cli.data.labels import check_range, class_labels, number_labels, token_labels
from optin_cli.errors import GateError, InputError, UsageError
from optin_cli.measure import metrics
from optin_cli.models.checkpoint import OpenModel
from optin_cli.models.tasks import EMBEDDING, IMAGE, QUESTION, SEQUENCE, TOKEN, Task

Progress = Callable[[int, int, str], None]
"""Called with (batches done, batches in all, what is being done)."""

_ROUNDING = 1e-9


@dataclass
class Evaluation:
    """What `evaluate` found. Metrics are in points: 100 is perfect."""

    task: str
    examples: int
    metrics: dict[str, float]
    """Empty when the data has no labels that the task can use."""
    main: str
    """The metric that `drop` is about; '' when there are no metrics."""
    baseline_metrics: dict[str, float] = field(default_factory=dict)
    fidelity: dict[str, float] = field(default_factory=dict)
    """Classifiers: agreement (points), kl (nats, KL(baseline || model) a row). Embeddings: cosine,
    top10_overlap (points). Regression: mean_abs_difference (in units of the label)."""
    drop: float | None = None
    """Points of the main metric lost to the baseline; without labels, 100 - agreement or 100 - cosine."""
    broken: int = 0
    """Rows that were left out, since their images can't be used."""


def evaluate(
    model: OpenModel,
    batches: Batches,
    baseline: OpenModel | None = None,
    on_progress: Progress | None = None,
) -> Evaluation:
    """Measure `model` on labelled data, and against `baseline` on any data.

    Raises `UsageError` when there are neither labels nor a baseline or the two models don't match,
    `InputError` for labels the model can't be measured on and for outputs that are not finite.
    """
    if baseline is not None and baseline.task.name != model.task.name:
        raise UsageError(
            f"{model.spec} does {model.task.name}, but the baseline {baseline.spec} does {baseline.task.name}"
        )
    where = f"{batches.examples.data.spec} ({batches.examples.data.split})"
    labels = _labels(model, batches, where)
    if labels is None and baseline is None:
        raise UsageError(
            f"nothing to measure: {where} has no labels for {model.task.name}",
            "compare with the dense model (--baseline MODEL), or name the label column with --label",
        )
    ours, theirs = _run(model, batches, baseline, labels, where, on_progress)
    result = Evaluation(model.task.name, batches.count, {}, "")
    result.broken = len(batches.examples.broken)
    if labels is not None:
        result.metrics = _metrics(model.task, ours, labels, where)
        result.main = next(name for name in ("accuracy", "top1", "spearman") if name in result.metrics)
    if baseline is not None:
        assert theirs is not None
        if labels is not None:
            result.baseline_metrics = _metrics(model.task, theirs, labels, where)
        result.fidelity = _fidelity(model, ours, theirs)
        result.drop = _drop(result)
    return result


def gate(evaluation: Evaluation, max_drop: float) -> None:
    """Raise `GateError` if more than `max_drop` points were lost, `UsageError` if no drop was measured."""
    drop = evaluation.drop
    if drop is None:
        raise UsageError(
            "--max-drop needs something to compare with", "give --baseline MODEL, and labels for a regression"
        )
    if not drop <= max_drop + _ROUNDING:
        what = evaluation.main or f"{next(iter(evaluation.fidelity), 'agreement')} with the baseline"
        raise GateError(
            f"{what} drops by {drop:.3f} points, more than the {max_drop:g} allowed",
            "keep more of the model (a larger budget), or allow a larger --max-drop",
        )


class _Outputs:
    """What is kept of one model's outputs, and the sums of its fidelity, until all batches are through."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.kept: list[Any] = []
        self.rows = self.same = self.kl = 0.0

    def keep(self, task: Task, batch: Batch, output: Tensor, weights: Tensor) -> None:
        """Vectors of one-row tasks, classes of a tagger's tokens, nothing of question answering."""
        self.ids += batch.example_ids
        if task.name == TOKEN:
            classes = output.argmax(dim=-1)  # (batch, tokens)
            pairs = zip(classes, weights > 0, strict=True)
            self.kept += [row[real].cpu().numpy() for row, real in pairs]
        elif task.name != QUESTION:
            self.kept.append(output[:, 0].cpu())

    def compare(self, output: Tensor, baseline: Tensor, weights: Tensor) -> None:
        """Add a batch's rows to the agreement and the divergence from the baseline."""
        ours, dense = output[weights > 0], baseline[weights > 0]  # (real rows, classes)
        self.rows += len(ours)
        self.same += float((ours.argmax(-1) == dense.argmax(-1)).sum())
        self.kl += float(metrics.kl_rows(dense, ours).sum())

    def vectors(self) -> Tensor:
        """[examples, classes], in the order of the examples."""
        return torch.cat(self.kept)[torch.tensor(self.ids).argsort()]

    def tags(self) -> list[Any]:
        return [row for _, row in sorted(zip(self.ids, self.kept, strict=True), key=lambda pair: pair[0])]


def _run(
    model: OpenModel,
    batches: Batches,
    baseline: OpenModel | None,
    labels: Sequence[Any] | None,
    where: str,
    on_progress: Progress | None,
) -> tuple[_Outputs, _Outputs | None]:
    """Each batch once through both models."""
    ours, theirs = _Outputs(), None if baseline is None else _Outputs()
    for index, batch in enumerate(batches):
        output, weights = _forward(model, batch)
        if index == 0 and labels is not None and not model.task.regression:
            check_range(labels, output.shape[-1], where)
        ours.keep(model.task, batch, output, weights)
        if baseline is not None and theirs is not None:
            expected = _forward(baseline, batch)[0].to(output.device)
            if expected.shape[1:] != output.shape[1:]:
                raise UsageError(
                    f"{model.spec} gives outputs of shape {tuple(output.shape[1:])}, "
                    f"but the baseline {baseline.spec} {tuple(expected.shape[1:])}",
                    "compare with the dense model it was made from",
                )
            theirs.keep(model.task, batch, expected, weights)
            if not model.task.regression:
                ours.compare(output, expected, weights)
        if on_progress:
            on_progress(index + 1, len(batches), "evaluating")
    return ours, theirs


@torch.inference_mode()
def _forward(model: OpenModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """(output [batch, rows, classes], row weights [batch, rows])"""
    inputs = batch.to(model.device, model.dtype).inputs
    output, weights = model.output(inputs), model.task.row_weights(inputs)
    broken = (~output.isfinite().all(dim=-1) & (weights > 0)).any(dim=-1)  # (batch)
    if broken.any():
        raise InputError(
            f"{model.spec} gives values that are not finite for {int(broken.sum())} of {len(batch)} examples",
            "the weights may be damaged; if it computes in half precision, try --dtype float32",
        )
    return output, weights


def _labels(model: OpenModel, batches: Batches, where: str) -> list[Any] | None:
    """The labels that the task is measured on, checked; None if there are none."""
    task = model.task
    measurable = task.name in (SEQUENCE, IMAGE, TOKEN) or (task.name == EMBEDDING and batches.separate)
    if not measurable:
        return None
    label2id = None if task.regression else getattr(getattr(model.module, "config", None), "label2id", None)
    labels = batches.labels(label2id)
    if labels is None:
        return None
    if task.name == TOKEN:
        return token_labels(labels, where)
    return (number_labels if task.regression else class_labels)(labels, where)


def _metrics(task: Task, outputs: _Outputs, labels: list[Any], where: str) -> dict[str, float]:
    if task.name == TOKEN:
        return metrics.tagging(outputs.tags(), labels)
    vectors = outputs.vectors()
    if task.name == EMBEDDING:
        # example 2 * row + side: even examples are first sentences, odd ones second
        cosines = torch.nn.functional.cosine_similarity(vectors[0::2], vectors[1::2], dim=-1)
        return metrics.correlation(cosines.numpy(), labels, where)
    if task.regression:
        return metrics.correlation(vectors[:, 0].numpy(), labels, where)
    return metrics.classification(vectors.numpy(), labels, images=task.name == IMAGE)


def _fidelity(model: OpenModel, ours: _Outputs, theirs: _Outputs) -> dict[str, float]:
    if not model.task.regression:
        return {"agreement": 100 * ours.same / ours.rows, "kl": ours.kl / ours.rows}
    mine, dense = (outputs.vectors() for outputs in (ours, theirs))
    if model.task.name != EMBEDDING:
        return {"mean_abs_difference": float(np.abs(mine.numpy() - dense.numpy()).mean())}
    found = {"cosine": metrics.mean_cosine(mine, dense)}
    if len(mine) > 1:
        device = model.device
        found["top10_overlap"] = metrics.neighbour_overlap(mine.to(device), dense.to(device))
    return found


def _drop(result: Evaluation) -> float | None:
    if result.main:
        return result.baseline_metrics[result.main] - result.metrics[result.main]
    likeness = result.fidelity.get("agreement", result.fidelity.get("cosine"))
    return None if likeness is None else 100 - likeness
