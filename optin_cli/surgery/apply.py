"""`apply`: physically remove what a mask leaves out and write a model directory that loads again.

The written folder is loaded back and compared with the masked dense model on real calibration rows before it
gets its final name: what is on disk is what was checked. Compensation comes before both: the masked model
with the new weights is what the sliced one is compared with. Where the mask merges tokens, weights are compensated on
whole sequences first, and both sides of the comparison run with the schedule.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optin_cli.artefacts.facts import PruningStep
from optin_cli.artefacts.files import atomic_dir
from optin_cli.artefacts.mask import Mask
from optin_cli.artefacts.provenance import library_versions
from optin_cli.artefacts.pruned import FILE_NAME, PrunedRecord, read_pruned, write_pruned
from optin_cli.data.batches import Batch, Batches
from optin_cli.data.examples import sample
from optin_cli.data.sources import BUILTIN_DOCS, DataSpec
from optin_cli.errors import ArtefactError, InputError, OptinError, UsageError
from optin_cli.models.anatomy import AUDIO, HEADS, NEURONS, TEXT, Anatomy
from optin_cli.models.checkpoint import OpenModel, open_model, save_pruned
from optin_cli.models.families import family_to_dict
from optin_cli.models.masking import masked, masks_from_keep
from optin_cli.models.merged import install_merges
from optin_cli.models.precision import exact_convolutions
from optin_cli.models.processors import ImageProcessor
from optin_cli.models.recordings import random_recordings
from optin_cli.models.slicing import slice_model
from optin_cli.models.token_sites import check_merges
from optin_cli.surgery.compensate import compensate
from optin_cli.surgery.norms import reestimate
from optin_cli.surgery.plan import CompensationPlan, own_data
from optin_cli.surgery.refit import NONE
from optin_cli.surgery.settings import Progress, SiteFit
from optin_cli.surgery.tolerance import tolerance

log = logging.getLogger("optin")

_CHECK_ROWS = 32
_CONFIG_NAMES = {HEADS: "num_attention_heads", NEURONS: "intermediate_size"}


@dataclass(frozen=True)
class Applied:
    """What was written and how well it matches."""

    path: Path
    deviation: float
    """Largest absolute difference between the outputs of the masked and the reloaded sliced model."""
    checked_on: str
    params: int
    dense_params: int
    fits: tuple[SiteFit, ...] = ()
    """What compensation did at each site; empty without compensation."""
    reused: bool = False
    tolerance: float = 0.0
    """The largest deviation that would have passed."""


def check_output(output: Path, model: OpenModel) -> None:
    """Raise `UsageError` unless `output` is free, or a pruned model other than the one being read."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / FILE_NAME).is_file():
        raise UsageError(
            f"{output} exists and was not made by optin",
            "choose another output; --force replaces pruned models only",
        )
    if model.source.folder is not None and output.resolve() == model.source.folder.resolve():
        raise UsageError(f"{output} is the model being read", "choose another output")


def check_unmade(output: Path) -> None:
    """Raise `UsageError` if a pruned model is at `output`: without a ranking nothing tells whether it is the same."""
    if (output / FILE_NAME).is_file():
        raise UsageError(
            f"{output} holds a pruned model already, and the ranking to compare it by is still to be made",
            "choose another name, or --force to replace it",
        )


def existing(
    output: Path, model: OpenModel, mask: Mask, plan: CompensationPlan | None = None
) -> Applied | None:
    """The pruned model already at `output` if it came from this model, mask and compensation; None if nothing is there.

    Raises `UsageError` when another pruned model is there.
    """
    if not (output / FILE_NAME).is_file():
        return None
    last = read_pruned(output).history[-1]
    # earlier models lack entries
    recorded = {"bn": False, "producers": False, **last.get("compensation", {"method": NONE})}
    asked = plan.identity() if plan else {"method": NONE, "bn": False, "producers": False}
    same = (last["mask"], last["model"]["digest"]) == (mask.digest, model.digest)
    if not same or any(recorded.get(key) != value for key, value in asked.items()):
        what = "compensation" if same else "mask or model"
        raise UsageError(
            f"{output} exists, made with another {what}",
            "choose another name, or --force to replace it",
        )
    fits = tuple(SiteFit(**fit) for fit in recorded.get("sites", ()))
    return Applied(
        output,
        last["deviation"],
        last["checked_on"],
        last["params"],
        model.dense["params"],
        fits,
        reused=True,
        tolerance=last.get("tolerance", 0.0),
    )


def apply(
    model: OpenModel,
    mask: Mask,
    output: Path,
    data: DataSpec | None = None,
    plan: CompensationPlan | None = None,
    on_progress: Progress = lambda *_: None,
    teacher: OpenModel | None = None,
) -> Applied:
    """Slice `model` by `mask` and write it to `output`, compensated by `plan`. The model in memory is consumed.

    `teacher` is what compensation follows: by default the model itself.
    `data` is where the check takes its rows from; by default the mask's own calibration data. Raises
    `ArtefactError` when mask and model don't belong together, `InputError` for merges that the model can't
    run, and `OptinError` when the check fails. The mask's schedule replaces the one that the model runs with.
    """
    check_belongs(model, mask)
    batches, checked_on = _check_batches(model, mask, data)
    fits = []
    if plan:
        with model.unmerged(), teacher.unmerged() if teacher else nullcontext():
            fits = compensate(model, mask.keep, plan.batches, plan.settings, on_progress, teacher)
            if plan.settings.bn:
                reestimate(model, plan.batches, mask.keep)
    if model.merging:
        model.merging.remove()
    expected = _outputs_masked(model, mask, batches)
    record = _record(model, mask)
    record.history[-1]["compensation"] = _compensation(plan, fits)
    slice_model(model.module, model.anatomy, mask.keep)
    params = sum(p.numel() for p in model.module.parameters())
    with atomic_dir(output) as folder:
        save_pruned(folder, model, record)
        allowed, dtype = tolerance(model.dtype, expected), str(model.dtype).removeprefix("torch.")
        reloaded = open_model(str(folder), device=str(model.device), dtype=dtype)
        deviation = _deviation(expected, _outputs(reloaded, mask, batches))
        if not deviation <= allowed:
            raise OptinError(
                f"the sliced model differs from the masked one by {deviation:.2e}, more than the {allowed:.0e} that "
                f"{dtype} explains; nothing was written",
                "this is a fault in the family's table or in optin: please report it with the mask",
            )
        record.history[-1] |= {
            "deviation": deviation,
            "tolerance": allowed,
            "checked_on": checked_on,
            "params": params,
        }
        write_pruned(folder, record)
    return Applied(
        output, deviation, checked_on, params, model.dense["params"], tuple(fits), tolerance=allowed
    )


def _compensation(plan: CompensationPlan | None, fits: list[SiteFit]) -> dict[str, Any]:
    """What the record says of a compensation."""
    if plan is None:
        return {"method": NONE}
    return {**plan.describe(), "sites": [asdict(fit) for fit in fits]}


def check_belongs(model: OpenModel, mask: Mask) -> None:
    """Raise `ArtefactError` unless `mask` was selected for exactly this model."""
    here = {site.name: site.units for site in model.anatomy}
    if mask.units != here:
        odd = [n for n in sorted(set(here) | set(mask.units)) if here.get(n) != mask.units.get(n)]
        raise ArtefactError(
            f"the mask is for other sites than {model.spec} has: {odd[0]} has {here.get(odd[0], 0)} units, "
            f"the mask says {mask.units.get(odd[0], 0)}",
            "select from a ranking of this model"
            if mask.family == model.family.name
            else f"it was scored with the table {mask.family!r}, and this is {model.family.name!r}: give the same "
            "--anatomy FILE.yaml",
        )
    if mask.model_digest != model.digest:
        raise ArtefactError(
            f"the mask belongs to other weights ({mask.model_digest[:12]}) than {model.spec} ({model.digest[:12]})",
            "score and select with this model, or give the model the ranking was made on",
        )
    check_merges(model.anatomy, mask.merges, "the mask")


def _check_batches(
    model: OpenModel, mask: Mask, data: DataSpec | None
) -> tuple[list[dict[str, Tensor]], str]:
    """Inputs to compare on, and where they come from: real rows wherever they can still be had."""
    row_ids = None if data else mask.calibration["row_ids"][:_CHECK_ROWS]
    rows = data or own_data(mask)
    try:
        return _inputs(model, rows, row_ids), rows.spec
    except OptinError as error:
        if data is not None:
            raise
        log.warning("the calibration data can't be read again (%s)", error.what)
    if model.family.modality == TEXT:
        log.warning("checking on %s instead", BUILTIN_DOCS)
        return _inputs(model, DataSpec(BUILTIN_DOCS), None), BUILTIN_DOCS
    if model.family.modality == AUDIO:
        log.warning("checking on random spectrograms instead")
        noise = random_recordings(model.module, 4, generator=torch.Generator().manual_seed(0))
        return [Batch(noise, None, []).to(model.device, model.dtype).inputs], "noise"
    log.warning("checking on noise images instead")
    return [_noise_images(model)], "noise"


def _noise_images(model: OpenModel) -> dict[str, Tensor]:
    """Four random images through the model's own transform."""
    from PIL import Image

    processor = model.processor
    assert isinstance(processor, ImageProcessor)
    noise = np.random.default_rng(0).integers(0, 256, (4, 256, 256, 3), dtype=np.uint8)
    pixels = torch.stack([processor(Image.fromarray(image)) for image in noise])
    return {processor.input_name: pixels.to(model.device, model.dtype)}


def _inputs(model: OpenModel, data: DataSpec, row_ids: list[int] | None) -> list[dict[str, Tensor]]:
    examples = sample(
        data, model.family.modality, _CHECK_ROWS, seed=0, row_ids=row_ids, reader=model.task.reader
    )
    batches = Batches(examples, model.processor, 8, reader=model.task.reader)
    return [batch.to(model.device, model.dtype).inputs for batch in batches]


@torch.inference_mode()
@exact_convolutions()
def _outputs(model: OpenModel, mask: Mask, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    """Outputs on every batch; in float64 where tokens merge or something is cut off at a threshold: what is next best,
    or above, by a rounding error alone would be so on one side and not on the other."""
    if not any(mask.merges) and not model.family.thresholds:
        return [model.output(inputs) for inputs in batches]
    dtype = model.dtype
    model.module.double()
    try:
        return [model.output({key: value.double() for key, value in batch.items()}) for batch in batches]
    finally:
        model.module.to(dtype)


def _outputs_masked(model: OpenModel, mask: Mask, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    masks = masks_from_keep(model.anatomy, mask.keep, model.device)
    merging = install_merges(model.module, model.anatomy, mask.merges, mask.keep, "the mask")
    try:
        with masked(model.module, model.anatomy, masks):
            outputs = _outputs(model, mask, batches)
    finally:
        merging.remove()
    if not all(torch.isfinite(output).all() for output in outputs):
        raise InputError(f"{model.spec} gives NaN or infinite outputs under this mask")
    return outputs


def _deviation(expected: list[Tensor], found: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True))


def _record(model: OpenModel, mask: Mask) -> PrunedRecord:
    """The record of the model to come; what it was made from goes into its history."""
    earlier = model.record
    kept = mask.keep
    if earlier is not None:  # indices count in the dense original, however often it was pruned
        kept = {name: [earlier.kept[name][i] for i in indices] for name, indices in mask.keep.items()}
    step: PruningStep = {
        "model": {"id": model.spec, "digest": model.digest},
        "ranking": mask.ranking_digest,
        "mask": mask.digest,
        "budget": mask.budget,
        "reached": mask.reached,
        "versions": library_versions(),
    }
    return PrunedRecord(
        library=model.source.library,
        architecture=model.source.architecture or type(model.module).__name__,
        task=model.task.name,
        family=family_to_dict(model.family),
        kept=kept,
        per_layer_config=_per_layer(model.anatomy, mask),
        dense=model.dense,
        merges=mask.merges,
        history=[*(earlier.history if earlier else []), step],
    )


def _per_layer(anatomy: Anatomy, mask: Mask) -> dict[str, dict[str, int]]:
    layers: dict[str, dict[str, int]] = {}
    for site in anatomy:
        layer, units = layers.setdefault(str(site.block), {}), len(mask.keep[site.name])
        plain = site.label == site.kind  # of two sites of heads, one has a name of its own
        layer[_CONFIG_NAMES.get(site.kind, site.label) if plain else site.label] = units * site.group
        if site.group > 1:
            layer["num_key_value_heads"] = units
    return layers
