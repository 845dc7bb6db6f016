"""Measure BatchNorm statistics again: after pruning, the norms get other inputs than in the dense model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from optin_cli.data.batches import Batches
from optin_cli.errors import UsageError, param
from optin_cli.execution.precision import exact_convolutions
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.transforms.masking import masked, masks_from_keep


def batch_norms(module: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """All BatchNorms that keep running statistics."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return [norm for norm in norms if norm.track_running_stats]


def check_norms(model: OpenModel) -> None:
    """Raise `UsageError` for a model without BatchNorms."""
    if not batch_norms(model.module):
        raise UsageError(
            f"{model.spec} has no BatchNorm whose statistics could be measured", f"leave {param('bn')} out"
        )


@torch.no_grad()
@exact_convolutions()
def reestimate(model: OpenModel, batches: Batches, keep: Mapping[str, list[int]] | None = None) -> None:
    """Replace, in place, the statistics of every BatchNorm by the mean over `batches`, of the units in `keep` alone.

    Every norm sees what the ones before give with the statistics of the same batch, as in training.
    """
    norms = batch_norms(model.module)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean
        norm.train()
    masks = masks_from_keep(model.anatomy, dict(keep or {}), model.device)
    try:
        with masked(model.module, model.anatomy, masks):
            for batch in batches:
                model.output(batch.to(model.device, model.dtype).inputs)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
            for statistic in (norm.running_mean, norm.running_var):
                if statistic is not None:  # as it will be stored
                    statistic.copy_(statistic.to(model.stored_dtype))
