"""What leaving a part of a unit out changes, by full forwards."""

from __future__ import annotations

import torch

from helpers.pruning import data_for
from optin_cli.data.batches import Batches
from optin_cli.data.examples import sample
from optin_cli.execution.hooks import block_outputs
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.scoring.calibration import Calibration, measured_blocks
from optin_cli.scoring.losses import output_change, relational_change, unit_rows
from optin_cli.transforms.masking import masked


def calibrate(model: OpenModel, rows: int = 24) -> Calibration:
    """Two batches of six examples."""
    found = sample(data_for(model), model.family.modality, 12, 0, reader=model.task.reader)
    return Calibration(model, Batches(found, model.processor, 6, reader=model.task.reader), rows, 4.0, seed=0)


def forward(calibration: Calibration, masks: dict[str, torch.Tensor]) -> tuple[dict, torch.Tensor]:
    """Unit rows of every block's feature, and the output, of one full forward of batch 0 under `masks`."""
    model, batch = calibration.model, calibration.batch(0)
    features: dict[int, torch.Tensor] = {}
    with (
        torch.inference_mode(),
        block_outputs(model, features),
        masked(model.module, model.anatomy, masks),
    ):
        output = model.output(batch.inputs)
    rows = calibration.feature_rows(0, [batch], {z: [f.shape[1]] for z, f in features.items()})
    return {z: unit_rows(f.flatten(0, 1)[rows[z][0]]) for z, f in features.items()}, output


def change(calibration: Calibration, site, unit: int | slice, kept: float) -> tuple[list[float], float]:
    """Trajectory and output terms by full forwards, when `kept` of a unit, or of several, stays."""
    mask = torch.ones(site.units)
    mask[unit] = kept
    dense, y = forward(calibration, {})
    variant, y_without = forward(calibration, {site.name: mask})
    task = calibration.model.task
    weights = calibration.model.row_weights(calibration.batch(0).inputs, y)
    settings = {"temperature": calibration.temperature, "term": task.term}
    columns = measured_blocks(site, len(calibration.model.anatomy.blocks))
    trajectory = [float(relational_change(dense[z], variant[z][None])) for z in columns]
    return trajectory, float(output_change(y, y_without[None], weights, **settings) / weights.sum())
