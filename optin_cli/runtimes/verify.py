"""The comparison of an exported file with the model in torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from optin_cli.errors import InputError, OptinError, param
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.measure.evaluate import fidelity
from optin_cli.runtimes.checks import Checks
from optin_cli.runtimes.settings import FLOAT16, FLOAT32
from optin_cli.runtimes.targets import Runtime, Session

_TOLERANCES = {FLOAT32: 1e-3, FLOAT16: 2e-2}
"""As a share of the largest output, or of 1 where all are smaller: runtimes add in other orders and approximate
exponentials, float16 rounds what every layer gives."""


def expected(model: OpenModel, module: torch.nn.Module, checks: Checks) -> list[list[Tensor]]:
    """The outputs of the program `module` on both batches. Raises `InputError` for those that are not finite."""
    with torch.inference_mode():
        found = [list(module(**batch).values()) for batch in checks.batches]
    if not all(bool(torch.isfinite(one).all()) for outputs in found for one in outputs):
        raise InputError(
            f"{model.spec} gives NaN or infinite outputs on {checks.where}", "check its weights, and its data"
        )
    return found


@dataclass(frozen=True)
class Deviation:
    """The distance of a file's outputs from torch's."""

    largest: float
    """Largest absolute difference."""
    tolerance: float | None
    """The largest that is allowed; None for int8, which is judged by agreement."""


def deviation(
    session: Session, wanted: Sequence[Sequence[Tensor]], checks: Checks, precision: str
) -> Deviation:
    """Run a file on both batches. Raises `OptinError` where it gives other shapes, what is not finite, or deviates."""
    differences, scale = [0.0], 1.0
    for batch, outputs in zip(checks.batches, wanted, strict=True):
        for found, one in zip(session(batch), outputs, strict=True):
            if found.shape != one.shape:
                raise _wrong(
                    f"gives a tensor of {tuple(found.shape)} where the model gives {tuple(one.shape)}"
                )
            if one.numel():
                differences.append(float((found.float() - one).abs().nan_to_num(float("inf")).max()))
                scale = max(scale, float(one.abs().max()))
    largest = max(differences)
    allowed = _TOLERANCES[precision] * scale if precision in _TOLERANCES else None
    if not largest <= (float("1e30") if allowed is None else allowed):
        raise _wrong(
            f"deviates by {largest:.2e} from the model in torch"
            + (f", more than {allowed:.0e}" if allowed else "")
        )
    return Deviation(largest, allowed)


def _wrong(what: str) -> OptinError:
    return OptinError(
        f"the exported file {what}; nothing was written",
        f"this is a fault of an exporter: export the model to another runtime ({param('to')}), and report it",
    )


def agreement(model: OpenModel, runtime: Runtime, checks: Checks) -> dict[str, float]:
    """Fidelity of a file to the model in torch, on all examples of the data."""
    assert checks.data is not None
    return fidelity(replace(model, runtime=runtime), checks.data, model)
