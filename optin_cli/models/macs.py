"""Multiply-accumulates of a whole forward, counted by torch itself, and the tokens that blocks see.

`Anatomy.macs` models the prunable part alone; these counts include embeddings, heads and whatever else runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from optin_cli.models.checkpoint import OpenModel
from optin_cli.models.hidden import as_rows, hidden_of


def count_macs(model: OpenModel, inputs: Mapping[str, Tensor]) -> int:
    """MACs of one forward on the whole batch: half of torch's own FLOP count."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.run(inputs)
    return counter.get_total_flops() // 2


def observed_tokens(model: OpenModel, inputs: Mapping[str, Tensor]) -> int:
    """Positions in the first block's output, class tokens included, none merged: what `Anatomy.macs` takes."""
    seen: list[int] = []

    def look(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(as_rows(hidden_of(output), model.anatomy.stream_of(0).layout).shape[1])

    handle = model.module.get_submodule(model.anatomy.blocks[0]).register_forward_hook(look)
    try:
        with torch.no_grad(), model.unmerged():
            model.run(inputs)
    finally:
        handle.remove()
    return seen[0]
