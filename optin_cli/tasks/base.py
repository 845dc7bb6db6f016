"""The interface of a task: the model's output, how rows become examples, the loss and the metrics.

An output is always a tensor [batch, rows, classes] with a weight for each row, so that the losses need no case
for each task: one row for a classifier or an embedding, one for each token of a tagger, two (start and end)
for question answering. The defaults are those of a classifier; a task overrides what is special about it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optin_cli.data.batches import Batch, Batches
from optin_cli.data.label_ids import class_names, numbering
from optin_cli.data.labels import check_range, check_varied, class_labels
from optin_cli.data.readers import ROWS, Reader
from optin_cli.errors import param
from optin_cli.tasks import metrics
from optin_cli.tasks.divergence import KL, Term, class_kl

Inputs = Mapping[str, Tensor]
Forward = Callable[..., Any]


@dataclass(frozen=True)
class Task:
    """A classifier of whole examples; the base of all other tasks."""

    name: ClassVar[str]
    auto_class: ClassVar[str]
    """The class of transformers that opens a model for the task."""
    architectures: ClassVar[tuple[str, ...]]
    """Endings of the names of model classes for the task."""
    reader: ClassVar[Reader] = ROWS
    """The reader that turns the rows of a data set into examples."""
    term: ClassVar[Term] = KL
    """The term that compares outputs in scores."""
    main: ClassVar[tuple[str, ...]] = ("accuracy",)
    """Metrics that a drop is about: the first that was measured."""
    sampled: ClassVar[bool] = False
    """`output` gives a sample of the rows, and `full_output` all of them."""
    reads_stages: ClassVar[bool] = False
    """Heads for it read the hidden states of several blocks: whatever the family says, blocks are unchained then."""
    label_option: ClassVar[str] = param("label")
    """The parameter that names what the labels are read from."""

    label2id: Mapping[str, int] = field(default_factory=dict, hash=False)
    """The model's own numbers of its classes, by name."""
    classes: int = 0
    """Return how many classes the model has."""

    @classmethod
    def from_config(cls, config: Any, folder: Path | None) -> Task:
        """The task of a transformers model, `folder` being its directory."""
        return cls._of_classes(config)

    @classmethod
    def _of_classes(cls, config: Any) -> Self:
        return cls(dict(getattr(config, "label2id", None) or {}), getattr(config, "num_labels", 0))

    # the model

    def body(self, model: Forward) -> Forward:
        """The part of `model` that its inputs run through: all of it, unless its head is of no task."""
        return model

    def output(self, model: Forward, inputs: Inputs) -> Tensor:
        """Run `model`: float32 [batch, rows, classes] of logits, values or a unit-length embedding."""
        return logits_of(model(**inputs)).float()[:, None, :]

    def row_weights(self, inputs: Inputs) -> Tensor:
        """Weight of each output row, [batch, rows]; zero for rows that count nothing. [batch, 1] is for all rows."""
        return ones(inputs, 1)

    def full_output(self, model: Forward, inputs: Inputs) -> Tensor:
        """Return the output that metrics are measured on, if `output` gives a sample of it."""
        return self.output(model, inputs)

    def full_weights(self, inputs: Inputs) -> Tensor:
        """Weight of each row of `full_output`."""
        return self.row_weights(inputs)

    @property
    def slots(self) -> int | None:
        """Token slots in one call while measuring, if a batch's `full_output` may be too large to hold."""
        return None

    # the labels

    def labels(self, batches: Batches) -> Any:
        """The labels that metrics are measured with, checked, one for each row of the data; None without any.

        Raises `InputError` for labels of another kind, hidden ones, and classes that the model does not have.
        """
        labels = batches.labels(dict(self.label2id))
        if labels is None:
            return None
        numbers = self.numbered(labels, batches.examples.where)
        check_range(numbers, self.classes, batches.examples.where)
        return numbers

    def numbered(self, labels: Sequence[Any], where: str) -> list[Any]:
        """Labels as class numbers. Raises `InputError` for others."""
        return class_labels(labels, where)

    def targets(self, batches: Batches) -> Any:
        """The labels that `loss` takes; None without any. Raises what `labels` does, and for labels all the same."""
        labels = self.labels(batches)
        if labels is not None:
            check_varied(labels, batches.examples.where)
        return labels

    def needed(self, batches: Batches) -> str | None:
        """Return what the data lacks for `targets`, besides a label column; None if it lacks nothing."""
        return None

    def loss(self, output: Tensor, labels: Sequence[Any]) -> Tensor:
        """The labelled loss of each example, (examples,), from its output (examples, rows, classes)."""
        return F.cross_entropy(output[:, 0], torch.tensor(labels, device=output.device), reduction="none")

    # how good a model is

    def keep(self, batch: Batch, output: Tensor, weights: Tensor, labels: Any) -> list[Any]:
        """Return what metrics need of a batch's output, one item for each example. `labels` are those of all data."""
        return list(output[:, 0].cpu())

    def metrics(self, kept: Sequence[Any], labels: Any, batches: Batches) -> dict[str, float]:
        """The metrics of all examples in order, in points: 100 is perfect."""
        logits = torch.stack(list(kept)).numpy()
        return metrics.classification(logits, labels, positive=self._positive(batches))

    def _positive(self, batches: Batches) -> int:
        """The class that F1 of two is about: the data's second, by the model's number."""
        rows, label = batches.examples.rows, batches.examples.columns.label
        feature = rows.features[label] if label else None
        if len(class_names(feature)) != 2:
            return 1
        return numbering([[0, 1]], feature, self.label2id, batches.examples.data.spec)(1)

    def lost(self, metric: str, ours: float, baseline: float) -> float:
        """Return the drop of a metric from the baseline's, in points."""
        return baseline - ours

    def compare(self, output: Tensor, baseline: Tensor, weights: Tensor) -> dict[str, float]:
        """Sums over the rows of a batch that `fidelity` is made of."""
        ours, dense = output[weights > 0], baseline[weights > 0]  # (real rows, classes)
        same = float((ours.argmax(-1) == dense.argmax(-1)).sum())
        return {"rows": len(ours), "agreement": 100 * same, "kl": float(class_kl(dense, ours).sum())}

    def fidelity(
        self, sums: Mapping[str, float], ours: Sequence[Any], theirs: Sequence[Any], device: torch.device
    ) -> dict[str, float]:
        """Return how close a model stays to its baseline, from the sums of `compare` and what both `keep`."""
        return {name: value / sums["rows"] for name, value in sums.items() if name != "rows"}


@runtime_checkable
class WritesText(Protocol):
    """A task whose model writes a text for each example, besides what `output` gives: it is compared, too."""

    def encoded(self, module: nn.Module, inputs: Inputs) -> Mapping[str, Any]:
        """The inputs of a batch, with what an encoder makes of them in place of what it reads: it runs once."""
        ...

    def write(self, module: nn.Module, inputs: Mapping[str, Any], processor: Any) -> list[str]:
        """The text that the model writes by itself for each example of a batch, given what `encoded` returns."""
        ...

    def texts(self, batches: Batches) -> list[str]:
        """The right text of each example, in order."""
        ...

    def text_metrics(
        self, module: nn.Module, texts: Sequence[str], wanted: Sequence[str], processor: Any
    ) -> dict[str, float]:
        """How far texts are from others: the right ones, or the baseline's."""
        ...


def logits_of(result: Any) -> Tensor:
    """The logits of what a classifier returns, in any library."""
    return result if isinstance(result, Tensor) else result.logits


def ones(inputs: Inputs, rows: int) -> Tensor:
    """Row weights [batch, rows] of a model whose rows all count."""
    first = next(iter(inputs.values()))
    return torch.ones(first.shape[0], rows, device=first.device)
