"""Models, batches and settings for the tests of compensation."""

from __future__ import annotations

import copy

import numpy as np
import torch

from helpers.data import tiny_image_folder, tiny_text_csv
from optin_cli.compensation.settings import Compensation
from optin_cli.data.batches import Batches
from optin_cli.data.examples import sample
from optin_cli.data.sources import DataSpec
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.transforms.masking import masked, masks_from_keep

FULL = Compensation(
    method="full", producers=False, readout=False, ridges=(1e-3,), read_share=0.8, batch_size=16
)
"""Of the consumers alone."""

AUTO = Compensation(batch_size=16)


def batches_for(model: OpenModel, folder, rows: int = 60, pairs: bool = False, seed: int = 0) -> Batches:
    if model.family.modality == "image":
        data = tiny_image_folder(folder / f"images{rows}-{seed}", n=rows, seed=seed)
    else:
        name = f"{rows}-{pairs}-{seed}.csv"
        data = tiny_text_csv(folder, rows=rows, labels=None, pairs=pairs, seed=seed, name=name)
    examples = sample(DataSpec(str(data)), model.family.modality, None, 0)
    return Batches(examples, model.processor, 16, reader=model.task.reader)


def copied(model: OpenModel) -> OpenModel:
    return OpenModel(
        model.source,
        copy.deepcopy(model.module),
        model.family,
        model.anatomy,
        model.task,
        model.stored_dtype,
    )


def half(model: OpenModel, seed: int = 0) -> dict[str, list[int]]:
    """About half of the units of every site, any of them."""
    rng = np.random.default_rng(seed)
    return {s.name: sorted(rng.choice(s.units, s.units // 2, replace=False).tolist()) for s in model.anatomy}


@torch.no_grad()
def outputs(model: OpenModel, keep, batches: Batches):
    """Outputs of the masked model on every example."""
    with masked(model.module, model.anatomy, masks_from_keep(model.anatomy, keep)):
        return torch.cat([model.output(batch.inputs)[:, 0] for batch in batches])
