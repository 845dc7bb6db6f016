"""Sublayers of heads that derivatives say nothing of: a norm right behind them undoes any scaling.

docs/method.md, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from optin_cli.data.batches import Batch
from optin_cli.execution.block_runs import OUTPUT, run_block
from optin_cli.execution.hooks import on_blocks
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.structure.anatomy import HEADS, Site
from optin_cli.structure.hidden_states import Arguments

_LITTLE = 0.05
"""Of the change without any head, the share that half of each may make: of a sum it is half."""


@torch.inference_mode()
def normed_sublayers(model: OpenModel, batch: Batch) -> set[str]:
    """Names of the sites of several heads whose scale a norm undoes, as in Gemma 2 and 3.

    Tried on a small `batch`: with all heads at half of their size the block gives what it gave, but for little, and
    without them something else.
    """
    calls: dict[int, Arguments] = {}

    def record(index: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[index] = (args, kwargs)

    with on_blocks(model.module, model.anatomy.blocks, record, before=True):
        model.output(batch.inputs)
    several = [site for site in model.anatomy if site.kind == HEADS and site.units > 1]
    return {site.name for site in several if _undoes_scale(model, site, calls[site.block])}


def _undoes_scale(model: OpenModel, site: Site, arguments: Arguments) -> bool:
    block = model.module.get_submodule(model.anatomy.blocks[site.block])
    entry = model.module.get_submodule(site.entry)

    def given(factor: float) -> Tensor:
        """What the block gives with its heads so large."""
        handle = entry.register_forward_pre_hook(lambda _, args: (args[0] * factor, *args[1:]))
        try:
            return run_block(block, arguments)[OUTPUT]
        finally:
            handle.remove()

    whole, half, none = (given(factor) for factor in (1.0, 0.5, 0.0))
    without = float((whole - none).norm())
    return without > 0 and float((whole - half).norm()) <= _LITTLE * without
