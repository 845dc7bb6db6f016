"""Fisher: squared gradients of the labelled task loss with respect to the masks (PTF: Kwon et al. 2022, section 4).

With l_i the loss of example i, F_u = 1/N sum_i (d l_i / d m_u)^2 at the full mask. PTF's code squares the mean
gradient of each batch of 32 examples instead (`per_batch`): what differs between examples cancels before the square.
Only this method needs labels. The gradients themselves are what PTF rearranges masks with, so they make a sketch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from optin_cli.data.batches import IGNORE, Batch, Batches
from optin_cli.data.labels import check_range, check_varied, class_labels, number_labels, token_labels
from optin_cli.errors import InputError, UsageError
from optin_cli.models.anatomy import Site
from optin_cli.models.checkpoint import OpenModel
from optin_cli.models.tasks import EMBEDDING, QUESTION, TOKEN, Task
from optin_cli.scoring.calibration import Calibration
from optin_cli.scoring.graphs import in_pieces, record_graph

_OTHERS = "auto, knowledge and magnitude need no labels"


@dataclass
class Fisher:
    """What one batch gives, site name -> array."""

    output: dict[str, np.ndarray]
    """(units,): mean over rows of the squared gradients; of one mean gradient with `per_batch`."""
    rows: dict[str, np.ndarray]
    """(rows, units): gradients, scaled so that their squares add up to `output`."""


def read_labels(model: OpenModel, batches: Batches) -> list[Any]:
    """The label of every row of the data, as the loss takes it.

    Similarities of an embedding model's sentence pairs are divided by the largest. Raises `UsageError` for data
    and tasks without labels, `InputError` for labels that are missing, of another kind, or all the same.
    """
    where = f"{batches.examples.data.spec} ({batches.examples.data.split})"
    task = model.task
    if task.name == QUESTION:
        raise UsageError(
            "--method fisher can't read the answers that question answering is labelled with", _OTHERS
        )
    if task.name == EMBEDDING and not batches.separate:
        raise UsageError(
            "--method fisher of an embedding model needs two text columns and their similarity as label",
            f"name them with --text A,B --label C; {_OTHERS}",
        )
    config = getattr(model.module, "config", None)
    labels = batches.labels(None if task.regression else getattr(config, "label2id", None))
    if labels is None:
        raise UsageError(
            f"{where} has no label column, and --method fisher needs labels",
            f"name one with --label; {_OTHERS}",
        )
    if task.regression or task.name == EMBEDDING:
        numbers = number_labels(labels, where)
        check_varied(numbers, where)
        return _shares(numbers, where) if task.name == EMBEDDING else numbers
    numbered = (token_labels if task.name == TOKEN else class_labels)(labels, where)
    classes = int(getattr(model.module, "num_classes", 0) or getattr(config, "num_labels", 0))
    check_range(numbered, classes, where)
    check_varied(numbered, where)
    return list(numbered)


def _shares(similarities: list[float], where: str) -> list[float]:
    largest = max(similarities)
    if largest <= 0:
        raise InputError(
            f"the largest similarity in {where} is {largest:g}: it should be that of equal texts"
        )
    return [value / largest for value in similarities]


def row_examples(ids: Sequence[int], together: bool, per_batch: bool) -> list[int]:
    """The example that each row of gradients of a batch is of: the first side of a pair, the first of a batch."""
    found = list(dict.fromkeys(i - i % 2 if together else i for i in ids))
    return found[:1] if per_batch else found


def fisher(
    calibration: Calibration,
    index: int,
    sites: Sequence[Site],
    labels: Sequence[Any],
    per_batch: bool = False,
) -> Fisher:
    """Fisher scores from batch `index`. `labels` has one label for each row of the data (`read_labels`)."""
    sites = [site for site in sites if site.units]
    rows = in_pieces(
        calibration, index, sites, lambda pieces: _gradients(calibration, index, sites, pieces, labels)
    )
    for name, found in rows.items():
        rows[name] = found.mean(0, keepdims=True) if per_batch else found / len(found) ** 0.5
    return Fisher({name: np.square(found, dtype=np.float64).sum(0) for name, found in rows.items()}, rows)


def _gradients(
    calibration: Calibration,
    index: int,
    sites: Sequence[Site],
    pieces: Sequence[Batch],
    labels: Sequence[Any],
) -> dict[str, np.ndarray]:
    """d l_i / d m_u of every row i of a batch, site name -> (rows, units)."""
    model, together = calibration.model, calibration.batches.together
    pull = _pair_pull(model, pieces, labels) if together else _label_pull(model.task, labels)
    examples = row_examples(calibration.batches.ids(index), together, per_batch=False)
    place = {example: row for row, example in enumerate(examples)}
    rows = {site.name: np.zeros((len(examples), site.units), np.float32) for site in sites}
    for piece in pieces:
        graph = record_graph(model, piece, sites)
        calibration.check_finite(graph.features, index)
        found = graph.gradients(graph.output, pull(piece, graph.output.detach()), sites, reduced=False)
        where = [place[i - i % 2 if together else i] for i in piece.example_ids]
        for site, gradient in zip(sites, found, strict=True):
            # the masks act on both sides of a pair: the gradient of its loss is the sum over them
            np.add.at(rows[site.name], where, gradient.cpu().numpy())
        del graph  # before the next piece's graph is made
    return rows


Pull = Callable[[Batch, Tensor], Tensor]
"""Gradient of every example's loss with respect to its output, (examples, rows, classes)."""


def _label_pull(task: Task, labels: Sequence[Any]) -> Pull:
    def pull(piece: Batch, output: Tensor) -> Tensor:
        wanted = [labels[i] for i in piece.example_ids]
        with torch.enable_grad():
            output = output.requires_grad_()
            return torch.autograd.grad(task_loss(task, output, wanted).sum(), output)[0]

    return pull


def task_loss(task: Task, output: Tensor, labels: Sequence[Any]) -> Tensor:
    """The loss of each example, (examples,), from its output (examples, rows, classes).

    Cross-entropy of classes, a tagger's as the mean over the labelled tokens; squared error of values.
    """
    if task.regression:
        return (output[:, 0, 0] - torch.tensor(labels, device=output.device)).square()
    if task.name != TOKEN:
        return F.cross_entropy(output[:, 0], torch.tensor(labels, device=output.device), reduction="none")
    slots = output.shape[1]
    wanted = torch.tensor([(row + [IGNORE] * slots)[:slots] for row in labels], device=output.device)
    losses = F.cross_entropy(output.transpose(1, 2), wanted, ignore_index=IGNORE, reduction="none")
    return losses.sum(1) / (wanted != IGNORE).sum(1).clamp(min=1)


def _pair_pull(model: OpenModel, pieces: Sequence[Batch], labels: Sequence[float]) -> Pull:
    """(cos(e, e') - label)^2 pulled to a side's unit-length embedding e: 2 (cos - label) e', e' of a pass before."""
    embeddings: dict[int, Tensor] = {}
    for piece in pieces:
        with torch.no_grad():
            embeddings |= zip(piece.example_ids, model.output(piece.inputs), strict=True)  # (1, d) each

    def pull(piece: Batch, output: Tensor) -> Tensor:
        other = torch.stack([embeddings[i ^ 1] for i in piece.example_ids])  # (examples, 1, d)
        label = torch.tensor([labels[i // 2] for i in piece.example_ids], device=output.device)
        cosine = (output * other).sum((1, 2))
        return 2 * (cosine - label)[:, None, None] * other

    return pull
