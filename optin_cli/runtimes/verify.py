"""The comparison of an exported file with the model in torch: real batches of two sizes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from optin_cli.data.batches import Batch, Batches
from optin_cli.data.opening import open_batches
from optin_cli.data.sources import BUILTIN_DOCS, DataSpec
from optin_cli.errors import InputError, OptinError, UsageError, param
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.loading.processors import ImageProcessor
from optin_cli.measure.evaluate import fidelity
from optin_cli.runtimes.settings import FLOAT16, FLOAT32
from optin_cli.runtimes.targets import Runtime, Session
from optin_cli.structure.anatomy import AUDIO, TEXT
from optin_cli.structure.audio_inputs import random_recordings

log = logging.getLogger("optin")

SAMPLES = 256
"""Examples that int8 is measured on."""
_BATCH, _SECOND = 8, 3
_CALIBRATION = 8
_TOLERANCES = {FLOAT32: 1e-3, FLOAT16: 2e-2}
"""As a share of the largest output, or of 1 where all are smaller: runtimes add in other orders and approximate
exponentials, float16 rounds what every layer gives."""


@dataclass(frozen=True)
class Checks:
    """What files are compared on."""

    batches: list[dict[str, Tensor]]
    """Two, of different sizes: all that a file leaves open differs."""
    where: str
    """The data they are from, or `noise`."""
    data: Batches | None
    """All examples of the data; None for noise."""

    @property
    def count(self) -> int:
        """Examples that int8 is measured on."""
        return self.data.count if self.data else 0

    @property
    def calibration(self) -> list[dict[str, Tensor]]:
        """Some batches to choose by: short texts and long ones. Raises `UsageError` for noise."""
        if self.data is None:
            raise UsageError("int8 is chosen on real examples", f"give {param('data', meta='DATA')}")
        step = -(-len(self.data) // _CALIBRATION)
        return [self.data[index].inputs for index in range(0, len(self.data), step)]

    @property
    def shapes(self) -> list[list[int]]:
        return [list(next(iter(batch.values())).shape) for batch in self.batches]


def open_checks(
    model: OpenModel, data: DataSpec | None, seed: int = 0, max_length: int | None = None
) -> Checks:
    """Batches of `data`; by default of Python's docstrings for text, and noise for images and recordings.

    Raises what opening the data raises.
    """
    if data is None and model.family.modality == TEXT:
        data = DataSpec(BUILTIN_DOCS)
    if data is None:
        log.warning("the file is checked on noise: give it data for real examples")
        return Checks(_two([_noise(model)]), "noise", None)
    found = open_batches(data, model, SAMPLES, _BATCH, seed, at_most=True, max_length=max_length)
    ends = [found[len(found) - 1], found[0]]  # long texts, short ones
    return Checks(_two([batch.to(model.device).inputs for batch in ends]), data.spec, found)


def _two(found: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The first batch, and one of fewer examples and tokens. Both have at least two: torch takes one for fixed."""
    first = {name: _at_least_two(value) for name, value in found[0].items()}
    length = _tokens(first)
    few = {
        name: value[: min(_SECOND, max(2, len(value) - 1))]
        for name, value in (found[1] if len(found) > 1 and _tokens(found[1]) < length else first).items()
    }
    if length and _tokens(few) >= length:
        few = {
            name: value[:, : max(2, value.shape[1] // 2)] if _is_tokens(value) else value
            for name, value in few.items()
        }
    return [first, {name: _at_least_two(value) for name, value in few.items()}]


def _is_tokens(value: Tensor) -> bool:
    return value.dim() == 2 and not value.is_floating_point()


def _tokens(inputs: dict[str, Tensor]) -> int:
    """Tokens of an example; 0 for images."""
    return max((value.shape[1] for value in inputs.values() if _is_tokens(value)), default=0)


def _at_least_two(value: Tensor) -> Tensor:
    value = value if len(value) > 1 else value.repeat(2, *[1] * (value.dim() - 1))
    return value.repeat(1, 2) if _is_tokens(value) and value.shape[1] == 1 else value


def _noise(model: OpenModel) -> dict[str, Tensor]:
    """Random images through the model's own transform, or spectrograms."""
    if model.family.modality == AUDIO:
        noise = random_recordings(model.module, _BATCH, generator=torch.Generator().manual_seed(0))
        return Batch(noise, None, []).to(model.device).inputs
    from PIL import Image

    processor = model.processor
    assert isinstance(processor, ImageProcessor)
    images = np.random.default_rng(0).integers(0, 256, (_BATCH, 256, 256, 3), dtype=np.uint8)
    pixels = torch.stack([processor(Image.fromarray(image)) for image in images])
    return {processor.input_name: pixels.to(model.device)}


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
