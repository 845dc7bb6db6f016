"""Knowledge: what of the model's predictions and representations a unit carries (K-prune: Park et al., ICLR 2024).

Predictive: the second-order term of tau^2 KL(whole || without u) at temperature tau, a mean over the examples.
The first-order term is zero at the full mask, and the second is half the true Fisher information: random
gradients as curvature draws them, no labels.
Representational: ||h_u W_u||_F^2, what u adds to its sub-layer's output, summed over the real tokens of an example,
a mean over the examples. h_u is the part of the consumer's input that belongs to u, W_u its columns of the consumer:
exact, without the products, because ||h W||^2 = <h^T h, W W^T>.

K-prune scores and prunes one sub-layer after the other and tunes in between; here all are scored on the whole model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from optin_cli.artefacts.ranking import RankedSite
from optin_cli.data.batches import Batch
from optin_cli.scoring.calibration import Calibration
from optin_cli.scoring.graphs import in_pieces, record_graph
from optin_cli.scoring.losses import output_probe
from optin_cli.scoring.methods.base import Arrays, Item, OnWork, ScoringMethod, item_scores
from optin_cli.structure.anatomy import HEADS, NEURONS, Site
from optin_cli.structure.layers import matrix, patches
from optin_cli.tasks.divergence import SQUARES


class KnowledgeMethod(ScoringMethod):
    """K-prune: predictive knowledge as the output part, representational as the one trajectory column."""

    name = "knowledge"
    kinds = frozenset({HEADS, NEURONS})
    sketches = ("or",)
    temperature = 2.0
    output_weight = 0.00025
    """lambda of K-prune; its search also tries 1."""

    def columns(self, site: Site) -> list[int]:
        return [site.block]

    def items(self) -> list[Item]:
        probes = self.settings.probes
        return [
            Item(self.name, batch, probes=(0, probes), work=1.0 + 1.5 * probes)
            for batch in range(len(self.calibration))
        ]

    def run(self, item: Item, on_work: OnWork) -> Arrays:
        sketched = self.sketched_probes()
        found = knowledge(self.calibration, item.batch, list(self.anatomy), range(*item.probes), sketched)
        rows = found.rows if sketched else None
        return item_scores(found.predictive, found.representational, output_rows=rows)

    def combine(self, sites: list[RankedSite]) -> dict[str, np.ndarray]:
        return combine(sites, self.settings.output_weight or 0.0, self.settings.head_weight)


@dataclass
class Knowledge:
    """Results of one batch, site name -> array."""

    representational: dict[str, np.ndarray]
    """(units, 1)"""
    predictive: dict[str, np.ndarray]
    """(units,): mean over the probes."""
    rows: dict[str, np.ndarray]
    """(sketched probes * examples, units): gradients whose squares over one probe add up to its `predictive`."""


def combine(sites: Iterable[RankedSite], weight: float, head_weight: float) -> dict[str, np.ndarray]:
    """Scores from their parts: S(u) = mu (predictive + lambda representational), mu = `head_weight` of heads, else 1.

    K-prune sets mu = 64. Here the search already divides by MACs, a head's being some 2 head_dim neurons', and both
    parts are losses in one unit for either kind, so that the default is 1.
    """
    return {
        site.name: (head_weight if site.kind == HEADS else 1.0)
        * (site.output + weight * site.trajectory.sum(axis=1))
        for site in sites
    }


def knowledge(
    calibration: Calibration, index: int, sites: Sequence[Site], probes: range, sketched: int = 0
) -> Knowledge:
    """Score batch `index`; every number of `probes` seeds its signs, those below `sketched` are kept as rows."""
    sites = [site for site in sites if site.units]
    kept = len(probes[: max(0, sketched - probes.start)])

    def run(pieces: list[Batch]) -> Knowledge:
        return _measured(calibration, index, sites, pieces, probes, kept)

    return in_pieces(calibration, index, sites, run)


def _measured(
    calibration: Calibration,
    index: int,
    sites: Sequence[Site],
    pieces: Sequence[Batch],
    probes: range,
    kept: int,
) -> Knowledge:
    model, examples = calibration.model, len(calibration.batches.ids(index))
    result = Knowledge(
        representational={s.name: np.zeros((s.units, 1)) for s in sites},
        predictive={s.name: np.zeros(s.units) for s in sites},
        rows={s.name: np.zeros((kept * examples, s.units), np.float32) for s in sites},
    )
    weights = [model.task.row_weights(piece.inputs) for piece in pieces]
    total = sum(float(w.sum()) for w in weights)
    generators = [calibration.generator(index, stream=probe + 1) for probe in probes]
    first = 0  # example
    for piece, weight in zip(pieces, weights, strict=True):
        graph = record_graph(model, piece, sites)
        calibration.check_finite(graph.features, index)
        for site in sites:
            valid = piece.real(model.anatomy.stream_of(site.block).mask)
            for leaf in graph.inputs[site.name]:
                parts = _contributions(model.module, site, leaf.value.detach(), valid)
                result.representational[site.name][:, 0] += parts / examples
        for number, generator in enumerate(generators):
            seed = _seed(calibration, graph.output.detach(), weight / total, generator)
            start = number * examples + first
            for site, gradient in zip(sites, graph.gradients([graph.output], [seed], sites), strict=True):
                values = gradient.cpu().numpy()
                result.predictive[site.name] += np.square(values, dtype=np.float64).sum(0) / len(probes)
                if number < kept:
                    result.rows[site.name][start : start + len(piece)] = values
        first += len(piece)
        del graph  # before the next piece's graph is made
    return result


def _seed(calibration: Calibration, output: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
    """A random gradient with respect to the output whose square estimates tau^2 KL."""
    tau, term = calibration.temperature, calibration.model.task.term
    seed = output_probe(output, weights, generator, temperature=tau, term=term)
    return seed if term == SQUARES else seed * tau


def _contributions(module: nn.Module, site: Site, inputs: Tensor, valid: Tensor | None) -> np.ndarray:
    """||h_u W_u||_F^2 over the real tokens (`valid`) of a piece, (units,); `inputs` is what the consumer is given."""
    consumer = module.get_submodule(site.consumer)
    rows = (
        patches(consumer, inputs).movedim(site.batch_axis, 0).flatten(0, -2)
    )  # (examples * tokens, features)
    real = rows if valid is None else rows[valid.flatten()]
    parts = real.float().unflatten(-1, (site.units, -1)).movedim(1, 0)  # (units, real tokens, width)
    columns = matrix(consumer).float().t().unflatten(0, (site.units, -1))  # (units, width, d)
    gram = parts.mT @ parts  # (units, width, width)
    return (gram.double() * (columns @ columns.mT).double()).sum((1, 2)).cpu().numpy()
