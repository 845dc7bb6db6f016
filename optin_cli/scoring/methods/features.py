"""The base of Wanda-sp and FLAP: sums of what consumers are given, by feature, over the calibration's tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from optin_cli.artefacts.ranking import RankedSite
from optin_cli.data.batches import Batch
from optin_cli.scoring.methods.base import Arrays, Item, OnWork, ScoringMethod, item_scores
from optin_cli.structure.anatomy import HEADS, NEURONS, Site
from optin_cli.structure.layers import matrix, patches

Array = np.ndarray


@dataclass(frozen=True)
class Features:
    """What a site's consumer was given, and the weights that read it; a unit has `width` features."""

    tokens: float
    """Real tokens of an example, in the mean."""
    sums: Array
    """[units, width]: sums over the tokens of an example, in the mean."""
    squares: Array
    """[units, width]: of their squares."""
    weights: Array
    """[outputs, units, width]: the consumer's."""


class FeatureMethod(ScoringMethod):
    """A score from the moments of a consumer's inputs and its weights: one forward of each batch, no gradients.

    A site's trajectory columns are the tokens, the sums and the squares of `Features`: means over the examples, so
    that they add up over the batches to those of all tokens. Blocks that share a module are read at each use.
    """

    kinds = frozenset({HEADS, NEURONS})
    batches_compare = False

    def columns(self, site: Site) -> list[int]:
        return [site.block] * (1 + 2 * self._width(site))

    def run(self, item: Item, on_work: OnWork) -> Arrays:
        examples = len(self.calibration.batches.ids(item.batch))
        found = {site.name: np.zeros((site.units, len(self.columns(site)))) for site in self.anatomy}
        for piece in self.calibration.pieces(item.batch):
            with torch.inference_mode(), self._read(piece, found):
                self.model.output(piece.inputs)
        nothing = {site.name: np.zeros(site.units) for site in self.anatomy}
        return item_scores(nothing, {name: sums / examples for name, sums in found.items()})

    def features(self, site: RankedSite) -> Features:
        """The moments of a site, from the columns of `run`, over all calibration tokens."""
        tokens, moments = site.trajectory[:, 0], site.trajectory[:, 1:]
        sums, squares = np.split(moments, 2, axis=1)
        consumer = matrix(self._module(self.anatomy[site.name].consumer)).detach()
        weights = consumer.double().cpu().numpy().reshape(len(consumer), *sums.shape)
        return Features(float(tokens[0]) if len(tokens) else 0.0, sums, squares, weights)

    def _module(self, path: str) -> nn.Module:
        return self.model.module.get_submodule(path)

    def _width(self, site: Site) -> int:
        """Features of a unit, as many as the consumer has columns for it."""
        return matrix(self._module(site.consumer)).shape[1] // max(1, site.units)

    @contextmanager
    def _read(self, piece: Batch, found: dict[str, Array]) -> Iterator[None]:
        """Within the context, add what the consumers are given of a piece."""
        with ExitStack() as stack:
            for site in self.anatomy:
                if not site.units:
                    continue
                real = piece.real(self.anatomy.stream_of(site.block).mask)

                def add(
                    consumer: nn.Module,
                    args: tuple[Tensor, ...],
                    site: Site = site,
                    real: Tensor | None = real,
                ) -> None:
                    found[site.name] += _moments(consumer, args[0], site, real)

                stack.callback(self._module(site.consumer).register_forward_pre_hook(add).remove)
            yield


def _moments(consumer: nn.Module, given: Tensor, site: Site, real: Tensor | None) -> Array:
    """[units, 1 + 2 * width]: columns of a site, sums over the `real` tokens [examples, tokens] of what is `given`."""
    rows = patches(consumer, given).movedim(site.batch_axis, 0).flatten(0, -2)  # (tokens, features)
    rows = (rows if real is None else rows[real.flatten()]).double()
    units = rows.unflatten(-1, (site.units, -1))
    count = torch.full((site.units, 1), len(rows), dtype=torch.float64, device=rows.device)
    return torch.cat([count, units.sum(0), units.square().sum(0)], dim=1).cpu().numpy()
