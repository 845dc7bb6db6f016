"""What an exported file is compared on: real batches of two sizes, and more to measure int8 on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from optin_cli.data.batches import Batch, Batches
from optin_cli.data.opening import open_batches
from optin_cli.data.sources import BUILTIN_PROSE, DataSpec
from optin_cli.errors import OptinError, UsageError, param
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.loading.processors import ImageProcessor
from optin_cli.measure.inputs import default_size, dummy_inputs
from optin_cli.structure.anatomy import AUDIO, TEXT
from optin_cli.structure.audio_inputs import random_recordings

log = logging.getLogger("optin")

SAMPLES = 256
"""Examples that int8 is measured on."""
_BATCH, _SECOND = 8, 3
_CALIBRATION = 8
_NOISE = 16  # tokens


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
        self.need_examples()
        assert self.data is not None
        step = -(-len(self.data) // _CALIBRATION)
        return [self.data[index].inputs for index in range(0, len(self.data), step)]

    def need_examples(self) -> None:
        """Raise `UsageError` for noise."""
        if self.data is None:
            raise UsageError("int8 is chosen on real examples", f"give {param('data', meta='DATA')}")

    @property
    def shapes(self) -> list[list[int]]:
        return [list(next(iter(batch.values())).shape) for batch in self.batches]


def open_checks(
    model: OpenModel, data: DataSpec | None, seed: int = 0, max_length: int | None = None
) -> Checks:
    """Batches of `data`; by default of general English for text, and noise for images, recordings, and tasks that read
    more than a text.

    Raises what opening the data raises.
    """
    if data is None and model.family.modality == TEXT:
        try:
            return _of_data(model, DataSpec(BUILTIN_PROSE), seed, max_length)
        except OptinError as error:
            log.info("%s has none for this model: %s", BUILTIN_PROSE, error.what)
    if data is not None:
        return _of_data(model, data, seed, max_length)
    log.warning("the file is checked on noise: give it data for real examples")
    return Checks(_two([_noise(model, seed)]), "noise", None)


def _of_data(model: OpenModel, data: DataSpec, seed: int, max_length: int | None) -> Checks:
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


def _noise(model: OpenModel, seed: int) -> dict[str, Tensor]:
    """Random images through the model's own transform, spectrograms, or tokens."""
    if model.family.modality == TEXT:
        return dummy_inputs(model, _BATCH, min(_NOISE, default_size(model)), seed)
    if model.family.modality == AUDIO:
        noise = random_recordings(model.module, _BATCH, generator=torch.Generator().manual_seed(seed))
        return Batch(noise, None, []).to(model.device).inputs
    from PIL import Image

    processor = model.processor
    assert isinstance(processor, ImageProcessor)
    images = np.random.default_rng(seed).integers(0, 256, (_BATCH, 256, 256, 3), dtype=np.uint8)
    pixels = torch.stack([processor(Image.fromarray(image)) for image in images])
    return {processor.input_name: pixels.to(model.device)}
