"""The equations of layers that are refitted: summed batch by batch over both streams, solved at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from optin_cli.compensation.least_squares import NONE, Change, Layer, Moments, Refit, Rows, nothing, refit
from optin_cli.compensation.settings import Compensation, SiteFit
from optin_cli.errors import InputError, param
from optin_cli.structure.layers import matrix

_MOST_INPUTS = 12_000
"""Of a layer, taps counted: normal equations of so many take 1.2 GB."""
_ROUNDING = 1e-12
"""A mean squared error of so small a share is none: float32 is not more exact than that."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitted:
    """A layer that is refitted, and how its errors count."""

    name: str
    """Under which it is recorded: its site, or its own path."""
    path: str
    where: str
    """For errors: the block."""
    gain: Tensor
    """[outputs], float64: what each output is multiplied by before it is compared."""
    width: int = 1
    """Neighbouring inputs that `scale` has one factor for."""
    relative: bool = False
    """An error counts relative to the token's own spread, as the norms that read the stream see it."""
    norm: str = ""
    """The BatchNorm right behind the layer, whose bias serves as the layer's."""
    note: str = ""


T = TypeVar("T", bound=Fitted)


def reason_against(layer: Any) -> str:
    """Why a layer can't be refitted, whatever the rows; '' if it can."""
    outputs, columns = matrix(layer).shape
    if not outputs:
        return "it has no outputs left"
    return f"it has {columns} inputs, too many to fit" if columns > _MOST_INPUTS else ""


class Equations(Generic[T]):
    """Sums over rows of what layers read, the same tensor all of them, and of what their outputs lack.

    Some rows are held out to choose on.
    """

    def __init__(
        self, layers: Sequence[Any], targets: Sequence[T], device: torch.device, settings: Compensation
    ) -> None:
        self.layers = layers
        self.targets = targets
        self.settings = settings
        columns = matrix(layers[0]).shape[1]
        ends = accumulate((len(matrix(layer)) for layer in layers), initial=0)
        self.outputs = [slice(*both) for both in pairwise(ends)]
        """Of each layer."""
        self.fit, self.held = (
            Rows(columns, self.outputs[-1].stop, device, settings.ridges) for _ in range(2)
        )
        self.sizes = [0.0] * len(layers)
        """Sums over the held-out rows of the references that errors are a share of."""

    @property
    def dtype(self) -> torch.dtype:
        """That the equations are made of: errors are differences, and need no more digits."""
        return self.fit.dtype

    def add(
        self, x: Tensor, errors: Sequence[Tensor], weight: Tensor, dense: Sequence[Tensor], held_out: Tensor
    ) -> None:
        """Add rows: x [examples, positions, inputs], errors and dense values of each layer [..., outputs]; [examples,
        positions] are their weights, 0 for padding, and the bool `held_out`. A layer of relative errors is alone.
        """
        if self.targets[0].relative:
            (alone,) = dense
            size = alone.var(-1, correction=0)
            floor = 1e-6 * float(size[weight > 0].mean()) or 1.0
            weight = weight / size.clamp(min=floor)
            sizes = [size * alone.shape[-1]]
        else:
            sizes = [values.square().sum(-1) for values in dense]
        parts = [part.flatten(0, 1) for part in (x, torch.cat(list(errors), -1), weight)]
        for rows, chosen in ((self.fit, ~held_out), (self.held, held_out)):
            which = ((weight != 0) & chosen).flatten().nonzero()[:, 0]
            rows.add(*(part.index_select(0, which) for part in parts))
        for index, size in enumerate(sizes):
            self.sizes[index] += float((weight * size)[held_out].sum())

    def solve(self) -> list[tuple[Change, SiteFit]]:
        """The change of each layer that the settings choose. Raises `InputError` naming the block for values that are
        not finite."""
        fit, held = self.fit.moments(), self.held.moments()
        if not all(bool(torch.isfinite(sums).all()) for m in (fit, held) for sums in (m.gram, m.ee)):
            raise InputError(
                f"{self.targets[0].where} gives NaN or infinite values on the calibration data",
                f"check the checkpoint, or leave the compensation out: {param('compensate', 'none')}",
            )
        return [
            self._solved(layer, target, size, fit.of(outputs), held.of(outputs))
            for layer, target, size, outputs in zip(
                self.layers, self.targets, self.sizes, self.outputs, strict=True
            )
        ]

    def _solved(
        self, layer: Any, target: Fitted, size: float, fit: Moments, held: Moments
    ) -> tuple[Change, SiteFit]:
        has_bias = layer.bias is not None or bool(target.norm)
        consumer = Layer(matrix(layer).data, has_bias, target.gain, target.width)
        if held.rows and float(held.ee.sum()) <= _ROUNDING * size:
            found = Refit(nothing(consumer), 0.0, 0.0)
        else:
            found = refit(fit, held, consumer, self.settings.method, self.settings.ridges)
        share = 1 / size if size else 0.0
        return found.change, SiteFit(
            site=target.name,
            method=found.change.method,
            ridge=found.change.ridge,
            before=found.before * share,
            after=found.after * share,
            rows=int(fit.effective_rows),
            note="; ".join(part for part in (target.note, found.note) if part),
            layer=target.path,
        )


def left_alone(site: str, path: str, note: str) -> SiteFit:
    """The record of a layer that can't be refitted."""
    return SiteFit(site, NONE, None, 0.0, 0.0, 0, note, path)
