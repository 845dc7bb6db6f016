"""torch's own FLOP counter as an oracle, with the one formula that it lacks on a CPU before 2.15."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode


def flop_counter() -> FlopCounterMode:
    """A context that counts FLOPs, two for each multiply-accumulate; attention on a CPU included."""
    from torch.utils.flop_counter import FlopCounterMode  # imports triton

    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={op: _attention})


def _attention(query, key, value, *_, out_shape=None, **__) -> int:
    """Two products for each query head: [q, d] x [d, k] and [q, k] x [k, v]."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[-2] * width + 2 * batch * heads * queries * key[-2] * value[-1]
