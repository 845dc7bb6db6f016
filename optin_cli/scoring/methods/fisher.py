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

from optin_cli.data.batches import Batch
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.scoring.calibration import Calibration
from optin_cli.scoring.graphs import in_pieces, record_graph
from optin_cli.scoring.methods.base import Arrays, Item, OnWork, ScoringMethod, item_scores
from optin_cli.structure.anatomy import Site
from optin_cli.tasks.base import Task


class FisherMethod(ScoringMethod):
    """PTF: squared gradients of the labelled loss. It has no trajectory."""

    name = "fisher"
    needs_labels = True
    takes_per_batch = True
    sketches = ("or",)

    def items(self) -> list[Item]:
        return [Item(self.name, batch, probes=(0, 1), work=3.0) for batch in range(len(self.calibration))]

    def run(self, item: Item, on_work: OnWork) -> Arrays:
        assert self.labels is not None
        found = fisher(self.calibration, item.batch, list(self.anatomy), self.labels, self.settings.per_batch)
        return item_scores(found.output, output_rows=found.rows if self.settings.sketch_rows else None)

    def row_examples(self, batch: int) -> list[int]:
        batches = self.calibration.batches
        return row_examples(batches.ids(batch), batches.together, self.settings.per_batch)


@dataclass
class Fisher:
    """Results of one batch, site name -> array."""

    output: dict[str, np.ndarray]
    """(units,): mean over rows of the squared gradients; of one mean gradient with `per_batch`."""
    rows: dict[str, np.ndarray]
    """(rows, units): gradients, scaled so that their squares add up to `output`."""


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
    """Fisher scores from batch `index`. `labels` has one label for each row of the data (`labels.read_labels`)."""
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
        found = graph.gradients([graph.output], [pull(piece, graph.output.detach())], sites, reduced=False)
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
            return torch.autograd.grad(task.loss(output, wanted).sum(), output)[0]

    return pull


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
