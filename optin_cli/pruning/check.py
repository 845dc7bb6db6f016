"""The comparison of a sliced model with the masked one: a few examples, and the masked model's outputs."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from optin_cli.artefacts.mask import Mask
from optin_cli.compensation.plan import own_data
from optin_cli.data.batches import Batch, Batches
from optin_cli.data.opening import open_batches
from optin_cli.data.sources import BUILTIN_PROSE, DataSpec
from optin_cli.errors import InputError, OptinError, param
from optin_cli.execution.precision import exact_convolutions
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.loading.processors import ImageProcessor
from optin_cli.pruning.writers import Runnable
from optin_cli.structure.anatomy import AUDIO, TEXT
from optin_cli.structure.audio_inputs import random_recordings
from optin_cli.transforms.masking import masked, masks_from_keep
from optin_cli.transforms.token_merging import install_merges

log = logging.getLogger("optin")

_CHECK_ROWS, _BATCH = 32, 8


@dataclass(frozen=True)
class CheckRows:
    """The examples that the sliced and the masked model are compared on."""

    inputs: list[dict[str, Tensor]]
    where: str
    """The data they come from, or `noise`."""


@dataclass(frozen=True)
class Check:
    """Outputs of the masked model, which a sliced one has to match."""

    rows: CheckRows
    expected: list[Tensor]
    exact: bool
    """Compute in float64."""

    def outputs(self, model: Runnable) -> list[Tensor]:
        """Return the outputs of `model` on the same rows."""
        return _outputs(model, self.exact, self.rows.inputs)


def open_check(model: OpenModel, data: DataSpec, row_ids: list[int] | None = None) -> Batches:
    """A few examples of `data` to compare on: some that a fixed seed draws, or `row_ids`."""
    return open_batches(data, model, _CHECK_ROWS, _BATCH, seed=0, row_ids=row_ids)


def check_batches(model: OpenModel, mask: Mask) -> Batches:
    """The rows of the mask's own data that it remembers. Raises `InputError` where they are gone."""
    try:
        return open_check(model, own_data(mask), mask.calibration["row_ids"])
    except OptinError as error:
        raise InputError(
            f"the calibration data of the mask can't be read again to turn its heads on it ({error.template[0]})",
            f"give other rows with {param('data', meta='DATA')}",
        ) from error


def check_rows(model: OpenModel, mask: Mask, batches: Batches | None) -> CheckRows:
    """Return the examples to compare on and their origin: those of open `batches`, or real rows wherever they can still
    be had."""
    if batches is not None:
        return CheckRows(_some_of(model, batches), batches.examples.data.spec)
    rows = own_data(mask)
    try:
        found = open_check(model, rows, mask.calibration["row_ids"][:_CHECK_ROWS])
        return CheckRows([_placed(model, batch) for batch in found], rows.spec)
    except OptinError as error:
        log.warning("the calibration data can't be read again (%s)", error.what)
    if model.family.modality == TEXT:
        log.warning("checking on %s instead", BUILTIN_PROSE)
        found = open_check(model, DataSpec(BUILTIN_PROSE))
        return CheckRows([_placed(model, batch) for batch in found], BUILTIN_PROSE)
    if model.family.modality == AUDIO:
        log.warning("checking on random spectrograms instead")
        noise = random_recordings(model.module, 4, generator=torch.Generator().manual_seed(0))
        return CheckRows([_placed(model, Batch(noise, None, []))], "noise")
    log.warning("checking on noise images instead")
    return CheckRows([_noise_images(model)], "noise")


def _some_of(model: OpenModel, batches: Batches) -> list[dict[str, Tensor]]:
    """The first examples of evenly spaced batches: short texts and long ones."""
    count = min(len(batches), _CHECK_ROWS // _BATCH)
    chosen = [round(i * (len(batches) - 1) / max(1, count - 1)) for i in range(count)]
    return [_placed(model, batches[i].head(_BATCH)) for i in chosen]


def _placed(model: OpenModel, batch: Batch) -> dict[str, Tensor]:
    return batch.to(model.device, model.dtype).inputs


def _noise_images(model: OpenModel) -> dict[str, Tensor]:
    """Four random images through the model's own transform."""
    from PIL import Image

    processor = model.processor
    assert isinstance(processor, ImageProcessor)
    noise = np.random.default_rng(0).integers(0, 256, (4, 256, 256, 3), dtype=np.uint8)
    pixels = torch.stack([processor(Image.fromarray(image)) for image in noise])
    return {processor.input_name: pixels.to(model.device, model.dtype)}


def _is_exact(model: OpenModel, mask: Mask) -> bool:
    """Return whether to compare outputs in float64: where tokens merge, or something is cut off at a threshold,
    rounding could flip a comparison in one model only."""
    return any(mask.merges) or bool(model.family.thresholds)


@exact_convolutions()
def _outputs(model: Runnable, exact: bool, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    """Outputs on every batch, computed in float64 if they are to be `exact`."""
    if not exact or not isinstance(model, OpenModel):
        with torch.inference_mode():
            return [model.output(inputs) for inputs in batches]
    dtype = model.dtype
    model.module.double()  # outside of inference mode, which would leave weights that take no gradients
    try:
        with torch.inference_mode():
            return [model.output({key: value.double() for key, value in batch.items()}) for batch in batches]
    finally:
        model.module.to(dtype)


def expect(model: OpenModel, mask: Mask, rows: CheckRows) -> Check:
    """Run the masked model, merging tokens by the mask's schedule. Raises `InputError` for outputs that are not
    finite."""
    exact = _is_exact(model, mask)
    masks = masks_from_keep(model.anatomy, mask.keep, model.device)
    merging = install_merges(model.module, model.anatomy, mask.merges, mask.keep, "the mask")
    try:
        with masked(model.module, model.anatomy, masks):
            outputs = _outputs(model, exact, rows.inputs)
    finally:
        merging.remove()
    if not all(torch.isfinite(output).all() for output in outputs):
        raise InputError(f"{model.spec} gives NaN or infinite outputs under this mask")
    return Check(rows, outputs, exact)
