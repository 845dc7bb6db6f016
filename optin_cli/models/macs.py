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


def count_macs(model: OpenModel, inputs: Mapping[str, Tensor]) -> int:
    """MACs of one forward on the whole batch: half of torch's own FLOP count."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.module(**inputs)
    return counter.get_total_flops() // 2


def observed_tokens(model: OpenModel, inputs: Mapping[str, Tensor]) -> int:
    """Tokens that the first site's consumer sees, class tokens included: what `Anatomy.macs` takes."""
    seen: list[int] = []

    def look(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0].shape[1])  # (batch, tokens, features)

    consumer = model.module.get_submodule(model.anatomy.sites[0].consumer)
    handle = consumer.register_forward_pre_hook(look)
    try:
        with torch.no_grad():
            model.module(**inputs)
    finally:
        handle.remove()
    return seen[0]
