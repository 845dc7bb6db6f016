"""What a decoder with its cache outside reads of a prompt: there is nothing before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

IDS, MASK, POSITIONS = "input_ids", "attention_mask", "position_ids"
Shapes = Mapping[str, Sequence[int]]
"""Input of past keys or values -> (heads, width)."""


def positions_of(mask: Tensor, start: int = 0) -> Tensor:
    """Of each token behind `start`, how many real ones are before it, as transformers generates."""
    return (mask.cumsum(-1) - 1).clamp(min=0)[:, start:]


def with_empty_cache(inputs: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
    """The inputs of a file for tokens, (examples, tokens), and their mask."""
    ids = inputs[IDS]
    mask = inputs[MASK] if MASK in inputs else torch.ones_like(ids)
    empty = {name: torch.zeros(len(ids), heads, 0, width) for name, (heads, width) in shapes.items()}
    return {IDS: ids, MASK: mask, POSITIONS: positions_of(mask), **empty}
