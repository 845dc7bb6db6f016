"""The equations of one layer that is refitted: summed batch by batch over both streams, solved at the end."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optin_cli.errors import InputError
from optin_cli.models.layers import matrix
from optin_cli.surgery.refit import NONE, Consumer, Moments, Refit, nothing, refit
from optin_cli.surgery.settings import Compensation, SiteFit

_MOST_INPUTS = 12_000
"""Of a layer, taps counted: normal equations of so many take 1.2 GB."""
_ROUNDING = 1e-12
"""A mean squared error of so small a share is none: float32 is not more exact than that."""


def reason_against(layer: Any) -> str:
    """Why a layer can't be refitted, whatever the rows; '' if it can."""
    outputs, columns = matrix(layer).shape
    if not outputs:
        return "it has no outputs left"
    return f"it has {columns} inputs, too many to fit" if columns > _MOST_INPUTS else ""


class Equations:
    """Sums over rows of what a layer reads, and of what its outputs lack; some rows are held out to choose on."""

    def __init__(self, layer: Any, device: torch.device) -> None:
        self.layer = layer
        outputs, columns = matrix(layer).shape
        self.fit, self.held = (Moments.zeros(columns, outputs, device) for _ in range(2))
        self.size = 0.0
        """Sum over the held-out rows of what errors are told as a share of."""

    def add(self, x: Tensor, error: Tensor, weight: Tensor, size: Tensor, held_out: Tensor) -> None:
        """Add rows: x [examples, positions, inputs], error [..., outputs]; the others are [examples, positions].

        Rows of no weight are padding. `held_out` is a bool.
        """
        for moments, chosen in ((self.fit, ~held_out), (self.held, held_out)):
            rows = ((weight != 0) & chosen).nonzero(as_tuple=True)
            moments.add(x[rows], error[rows], weight[rows])
        self.size += float((weight * size)[held_out].sum())

    def solve(self, consumer: Consumer, settings: Compensation, block: int) -> Refit:
        """The change that the settings choose. Raises `InputError` naming the block for values that are not finite."""
        if not all(
            bool(torch.isfinite(sums).all()) for m in (self.fit, self.held) for sums in (m.gram, m.ee)
        ):
            raise InputError(
                f"block {block} gives NaN or infinite values on the calibration data",
                "check the checkpoint, or leave the compensation out: --compensate none",
            )
        if self.held.rows and float(self.held.ee.sum()) <= _ROUNDING * self.size:
            return Refit(nothing(consumer), 0.0, 0.0)
        return refit(self.fit, self.held, consumer, settings.method, settings.ridges)

    def told(self, site: str, path: str, found: Refit, note: str) -> SiteFit:
        """What was done, for the record."""
        share = 1 / self.size if self.size else 0.0
        return SiteFit(
            site=site,
            method=found.change.method,
            ridge=found.change.ridge,
            before=found.before * share,
            after=found.after * share,
            rows=int(self.fit.effective_rows),
            note="; ".join(part for part in (note, found.note) if part),
            layer=path,
        )


def left_alone(site: str, path: str, note: str) -> SiteFit:
    """The record of a layer that can't be refitted."""
    return SiteFit(site, NONE, None, 0.0, 0.0, 0, note, path)
