"""What the tests of every family's promises share."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from helpers.families import MORE_FAMILIES, SEGMENTERS
from helpers.flops import flop_counter
from helpers.runs import outputs, random_inputs
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.structure.hidden_states import as_rows, hidden_of
from optin_cli.transforms.masking import masked, masks_from_keep
from optin_cli.transforms.slicing import slice_model

SHARED = {"albert": [0], "albert-groups": [0, 2]}
"""Name -> blocks that hold sites: each is the first of those that share a module."""
SWINS = [name for name in MORE_FAMILIES if "swin" in name and name not in SEGMENTERS]

every_family = pytest.mark.parametrize("name", MORE_FAMILIES)


def sliced(model: OpenModel, keep: dict[str, list[int]]) -> nn.Module:
    """A copy of the module with the kept units alone."""
    module = copy.deepcopy(model.module)
    slice_model(module, model.anatomy, keep)
    return module


def masked_outputs(model: OpenModel, keep: dict[str, list[int]]) -> torch.Tensor:
    """Of the whole module on random inputs, with what is not kept at zero."""
    with masked(model.module, model.anatomy, masks_from_keep(model.anatomy, keep)):
        return outputs(model, model.module, random_inputs(model))


def is_shared(model: OpenModel) -> bool:
    """Whether a layer is between two sites."""
    consumers = {site.consumer for site in model.anatomy}
    return any(producer.path in consumers for site in model.anatomy for producer in site.producers)


def counted_macs(model: OpenModel, module: nn.Module) -> tuple[float, int]:
    """(MACs of the blocks by torch's FLOP counter, tokens that they see) for one example."""
    shapes: list[torch.Size] = []
    handle = module.get_submodule(model.anatomy.blocks[0]).register_forward_hook(
        lambda _, __, output: shapes.append(as_rows(hidden_of(output), model.family.layout).shape)
    )
    totals = []
    for batch in (1, 3):  # what relative positions cost once a batch is not counted as a unit's
        with torch.no_grad(), flop_counter() as counter:
            module(**random_inputs(model, batch=batch))
        flops = {path: sum(counts.values()) for path, counts in counter.get_flop_counts().items()}
        totals.append(
            sum(flops.get(f"{type(module).__name__}.{path}", 0) for path in set(model.anatomy.blocks))
        )
    handle.remove()
    return (totals[1] - totals[0]) / 4, shapes[0][1:-1].numel()
