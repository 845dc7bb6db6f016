"""Models, batches and settings for the tests of compensation."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import torch

from helpers.data import tiny_image_folder, tiny_text_csv
from helpers.models import new_folder
from optin_cli.compensation.settings import Compensation
from optin_cli.data.batches import Batches
from optin_cli.data.examples import Examples, sample
from optin_cli.data.sources import DataSpec
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.transforms.masking import masked, masks_from_keep

FULL = Compensation(
    method="full", producers=False, readout=False, ridges=(1e-3,), read_share=0.8, batch_size=16
)
"""Of the consumers alone."""

AUTO = Compensation(batch_size=16)


def batches_for(model: OpenModel, rows: int = 60, pairs: bool = False, seed: int = 0) -> Batches:
    """Batches of examples that are written and opened once."""
    examples = _examples(model.family.modality, rows, pairs, seed)
    return Batches(examples, model.processor, 16, reader=model.task.reader)


@cache
def _examples(modality: str, rows: int, pairs: bool, seed: int) -> Examples:
    if modality == "image":
        data = tiny_image_folder(new_folder(), n=rows, seed=seed)
    else:
        data = tiny_text_csv(new_folder(), rows=rows, labels=None, pairs=pairs, seed=seed)
    return sample(DataSpec(str(data)), modality, None, 0)


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
