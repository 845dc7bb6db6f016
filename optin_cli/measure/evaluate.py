"""Evaluate a model on its task and against the dense model, in one pass over the data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from optin_cli.artefacts.point import change_words
from optin_cli.data.batches import Batch, Batches
from optin_cli.data.glue import glue_task
from optin_cli.data.lengths import longest_seen, token_counts
from optin_cli.data.likeness import difference, seen_content
from optin_cli.errors import GateError, InputError, UsageError, param
from optin_cli.execution.allocator import freed_memory_kept
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.structure.anatomy import TEXT
from optin_cli.tasks.base import Task, WritesText
from optin_cli.tasks.language import NextToken

Progress = Callable[[int, int, str], None]
"""Called with (batches done, batches in all, what is being done)."""

_ROUNDING = 1e-9


@dataclass
class Evaluation:
    """The result of `evaluate`. Metrics are in points (100 is perfect), but for errors: perplexity, squared error, and
    error rates, which are in per cent."""

    task: str
    examples: int
    metrics: dict[str, float]
    """Empty when the data has no labels that the task can use."""
    main: str
    """The metric that `drop` is about; '' when there are no metrics."""
    baseline_metrics: dict[str, float] = field(default_factory=dict)
    fidelity: dict[str, float] = field(default_factory=dict)
    """Classifiers: agreement (points), kl (nats, KL(baseline || model) a row). Embeddings: cosine,
    top10_overlap (points). Regression: mean_abs_difference (in units of the label). Speech: also the error rates of
    the transcripts against the baseline's."""
    drop: float | None = None
    """Points of the main metric lost to the baseline, by which an error rate rises, or how many per cent the perplexity
    rises; without labels, 100 - agreement or 100 - cosine."""
    broken: int = 0
    """Rows that were left out, since their images can't be used."""
    longest: int | None = None
    """Tokens of the longest text; None for other data."""
    seen: int | None = None
    """Tokens of the longest text that the model was pruned on; None if it was not, or where that is not known."""
    longer: int = 0
    """Texts longer than that."""
    unlike: str = ""
    """How the data differs from what the model was pruned on; '' where it looks alike, or where that is not known."""

    @property
    def beyond(self) -> str:
        """By how much the texts exceed those that the model was pruned on; '' where they do not."""
        if not (self.longer and self.longest and self.seen):
            return ""
        return (
            f"{self.longer} of {self.examples} texts are longer than any that the model was pruned on: they have up "
            f"to {self.longest} tokens, {self.longest / self.seen:.1f} times the {self.seen} of those"
        )


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
    task, where = model.task, batches.examples.where
    labels = task.labels(batches)
    if labels is None and baseline is None:
        raise UsageError(
            f"nothing to measure: {where} has no labels for {task.name}",
            f"compare with the dense model ({param('baseline', meta='MODEL')}), or name the label column with "
            f"{task.label_option}",
        )
    with freed_memory_kept():
        ours, theirs, sums = _run(model, batches, baseline, labels, on_progress)
    result = Evaluation(task.name, batches.count, {}, "")
    result.broken = len(batches.examples.broken)
    _compare_lengths(result, model, batches)
    if model.record is not None:
        result.unlike = difference(seen_content(model.record.history[-1]), batches)
    if labels is not None:
        first = _reported(batches)
        result.metrics = _ordered(_metrics(model, ours, labels, batches), first)
        result.main = next(name for name in (*first, *task.main) if name in result.metrics)
    if baseline is not None:
        if labels is not None:
            result.baseline_metrics = _ordered(_metrics(baseline, theirs, labels, batches), first)
        result.fidelity = task.fidelity(sums, ours.in_order(), theirs.in_order(), model.device)
        if isinstance(task, WritesText) and ours.texts:
            result.fidelity |= task.text_metrics(
                model.module, ours.written(), theirs.written(), batches.processor
            )
        result.drop = _drop(task, result)
    return result


def fidelity(model: OpenModel, batches: Batches, baseline: OpenModel) -> dict[str, float]:
    """`Evaluation.fidelity` alone: no labels are read. Raises `InputError` for outputs that are not finite."""
    ours, theirs, sums = _run(model, batches, baseline, None, None)
    return model.task.fidelity(sums, ours.in_order(), theirs.in_order(), model.device)


def _metrics(model: OpenModel, kept: _Kept, labels: Any, batches: Batches) -> dict[str, float]:
    """Of what a model writes first: it is what its users see."""
    task = model.task
    found = task.metrics(kept.in_order(), labels, batches)
    if not isinstance(task, WritesText) or not kept.texts:
        return found
    return task.text_metrics(model.module, kept.written(), task.texts(batches), batches.processor) | found


def _compare_lengths(result: Evaluation, model: OpenModel, batches: Batches) -> None:
    """Note by how much the texts exceed those that the model was made on."""
    counts = token_counts(batches)
    result.longest = max(counts, default=None)
    result.seen = seen = longest_seen(model.record.history[-1]) if model.record else None
    if seen is not None:
        result.longer = sum(count > seen for count in counts)


def _reported(batches: Batches) -> tuple[str, ...]:
    """The metrics that the data is reported by, where it is a benchmark."""
    data = batches.examples.data
    known = glue_task(data.spec, data.config)
    return known.metrics if known else ()


def _ordered(found: dict[str, float], first: tuple[str, ...]) -> dict[str, float]:
    names = dict.fromkeys([*(name for name in first if name in found), *found])
    return {name: found[name] for name in names}


def gate(evaluation: Evaluation, max_drop: float) -> None:
    """Raise `GateError` if more than `max_drop` points (of perplexity: per cent) were lost, `UsageError` if no drop
    was measured."""
    drop = evaluation.drop
    if drop is None:
        raise UsageError(
            f"{param('max_drop')} needs something to compare with",
            f"give {param('baseline', meta='MODEL')}, and labels for a regression",
        )
    if not drop <= max_drop + _ROUNDING:
        what = evaluation.main or f"{next(iter(evaluation.fidelity), 'agreement')} with the baseline"
        raise GateError(
            f"{what} {change_words(evaluation.main, drop)}, more than the {max_drop:g} allowed",
            f"keep more of the model (a larger budget), or allow a larger {param('max_drop')}",
        )


class _Kept:
    """The outputs of one model, as far as the task needs them, until all batches are through."""

    def __init__(self) -> None:
        self.items: dict[int, Any] = {}
        self.texts: dict[int, str] = {}

    def add(
        self, task: Task, batch: Batch, output: Tensor, weights: Tensor, labels: Any, texts: list[str]
    ) -> None:
        self.items |= zip(batch.example_ids, task.keep(batch, output, weights, labels), strict=True)
        if texts:
            self.texts |= zip(batch.example_ids, texts, strict=True)

    def in_order(self) -> list[Any]:
        """One item for each example."""
        return [self.items[example] for example in sorted(self.items)]

    def written(self) -> list[str]:
        """The text that the model wrote for each example."""
        return [self.texts[example] for example in sorted(self.texts)]


def _run(
    model: OpenModel,
    batches: Batches,
    baseline: OpenModel | None,
    labels: Any,
    on_progress: Progress | None,
) -> tuple[_Kept, _Kept, Counter[str]]:
    """Each batch once through both models: what is kept of each, and the sums of their comparison."""
    task, ours, theirs = model.task, _Kept(), _Kept()
    sums: Counter[str] = Counter()
    others = None if baseline is None else _read_by(baseline, model, batches)
    unlike = others is not None and token_counts(others) != token_counts(batches)
    # a file of one forward writes nothing, and batches of tensors come without the tokenizer
    may_write = batches.processor is not None and not any(one.runtime for one in (model, baseline) if one)
    writer = task if may_write and isinstance(task, WritesText) else None
    for index, batch in enumerate(batches):
        for piece in [batch] if task.slots is None else batch.split(0, task.slots):
            output, weights, texts = _forward(model, piece, writer, batches.processor)
            ours.add(task, piece, output, weights, labels, texts)
            if baseline is not None:
                other = piece if others is None else others[index]
                if unlike and output.shape[1] > 1:
                    raise UsageError(
                        f"{model.spec} and the baseline {baseline.spec} split the texts into different tokens, and "
                        f"{task.name} has an output for each",
                        f"measure each without {param('baseline')}",
                    )
                expected, _, texts = _forward(baseline, other, writer, batches.processor)
                expected = expected.to(output.device)
                if expected.shape[1:] != output.shape[1:]:
                    raise UsageError(
                        f"{model.spec} gives outputs of shape {tuple(output.shape[1:])}, "
                        f"but the baseline {baseline.spec} {tuple(expected.shape[1:])}",
                        "compare with the dense model it was made from",
                    )
                theirs.add(task, other, expected, weights, labels, texts)
                sums.update(task.compare(output, expected, weights))
        if on_progress:
            on_progress(index + 1, len(batches), "evaluating")
    return ours, theirs, sums


def _read_by(baseline: OpenModel, model: OpenModel, batches: Batches) -> Batches | None:
    """The same batches as the baseline reads them, where it has other tokens than the model; else None.

    Raises `UsageError` where outputs are about tokens, so that those of two vocabularies can't be compared.
    """
    if model.family.modality != TEXT or not _differ(model, baseline):
        return None
    if batches.processor is None:
        raise UsageError(
            f"{model.spec} and the baseline {baseline.spec} have different tokens, and the data is tensors of ids",
            "give texts, which each model reads by its own tokenizer",
        )
    if isinstance(model.task, NextToken):
        raise UsageError(
            f"{model.spec} and the baseline {baseline.spec} have different tokens, and {model.task.name} predicts "
            "tokens: what they predict can't be compared",
            f"measure each without {param('baseline')}",
        )
    return batches.read_by(baseline.processor)


def _differ(model: OpenModel, baseline: OpenModel) -> bool:
    """Whether two models read texts as other ids, as those with fewer tokens do."""
    try:
        ours, theirs = model.processor.tokenizer, baseline.processor.tokenizer  # type: ignore[union-attr]
    except InputError:  # one is without: it can only have the other's
        return False
    return bool(ours.get_vocab() != theirs.get_vocab())


@torch.inference_mode()
def _forward(
    model: OpenModel, batch: Batch, writer: WritesText | None, processor: Any
) -> tuple[Tensor, Tensor, list[str]]:
    """(output [batch, rows, classes], row weights [batch, rows], the text written for each example, if any is)"""
    inputs: Mapping[str, Any] = batch.to(model.device, model.dtype).inputs
    if writer is not None:
        inputs = writer.encoded(model.module, inputs)
    output = model.full_output(inputs)
    weights = model.task.full_weights(inputs).expand(output.shape[:2])
    broken = (~output.isfinite().all(dim=-1) & (weights > 0)).any(dim=-1)  # (batch)
    if broken.any():
        raise InputError(
            f"{model.spec} gives values that are not finite for {int(broken.sum())} of {len(batch)} examples",
            f"the weights may be damaged; if it computes in half precision, try {param('dtype', 'float32')}",
        )
    return output, weights, [] if writer is None else writer.write(model.module, inputs, processor)


def _drop(task: Task, result: Evaluation) -> float | None:
    if result.main:
        return task.lost(result.main, result.metrics[result.main], result.baseline_metrics[result.main])
    likeness = result.fidelity.get("agreement", result.fidelity.get("cosine"))
    return None if likeness is None else 100 - likeness
