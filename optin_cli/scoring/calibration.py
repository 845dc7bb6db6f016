"""What both engines measure against: the same batches, the same sampled rows, the dense features."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from optin_cli.data.batches import Batch, Batches
from optin_cli.errors import InputError
from optin_cli.models.anatomy import Site
from optin_cli.models.checkpoint import OpenModel

Scores = tuple[np.ndarray, np.ndarray]
"""What an engine finds of a site on one batch: (trajectory [units, columns], output [units])."""


def hidden_of(value: Any) -> Tensor:
    """The hidden states in a block's output: the tensor itself or the first element of a tuple."""
    return value if isinstance(value, Tensor) else value[0]


def with_hidden(value: Any, hidden: Tensor) -> Any:
    """A block's output with its hidden states replaced."""
    return hidden if isinstance(value, Tensor) else (hidden, *value[1:])


def measured_blocks(site: Site, depth: int) -> list[int]:
    """Blocks whose features make the trajectory of a site's units: the deeper ones; for the last block its own."""
    return list(range(min(site.block + 1, depth - 1), depth))


@contextmanager
def block_outputs(model: OpenModel, outputs: dict[int, Tensor], first: int = 0) -> Iterator[None]:
    """Within the context, collect the hidden states that blocks `first`.. give, by block index."""
    with ExitStack() as stack:
        for index, path in enumerate(model.anatomy.blocks):
            if index >= first:

                def keep(_: nn.Module, __: Any, output: Any, index: int = index) -> None:
                    outputs[index] = hidden_of(output)

                stack.callback(model.module.get_submodule(path).register_forward_hook(keep).remove)
        yield


@dataclass
class Calibration:
    """The model, its batches and the choices that fix what a score means."""

    model: OpenModel
    batches: Batches
    rows: int
    """Tokens of a batch that enter the relations (OPTIN's K); fewer where a batch has fewer."""
    temperature: float
    seed: int

    def __len__(self) -> int:
        return len(self.batches)

    def batch(self, index: int) -> Batch:
        return self.batches[index].to(self.model.device, self.model.dtype)

    def weight(self, index: int) -> float:
        """Share of the examples that are in a batch."""
        return len(self.batches.ids(index)) / self.batches.count

    def sampled_rows(self, index: int, batch: Batch, tokens: int) -> Tensor:
        """Indices into the flattened (batch * tokens) rows: real tokens only, drawn by seed and batch."""
        if batch.valid is None:
            candidates = torch.arange(len(batch) * tokens)
        else:
            candidates = batch.valid.cpu().flatten().nonzero()[:, 0]
        if len(candidates) > self.rows:
            generator = self.generator(index)
            candidates = candidates[torch.randperm(len(candidates), generator=generator)[: self.rows]]
            candidates = candidates.sort().values
        return candidates.to(self.model.device)

    def generator(self, batch: int, stream: int = 0) -> torch.Generator:
        """A CPU generator of its own for each (seed, batch, stream), so that work can stop and resume anywhere."""
        mixed = (self.seed * 1_000_003 + batch) * 1_000_003 + stream
        return torch.Generator().manual_seed(mixed % (2**63))

    def check_finite(self, features: dict[int, Tensor], index: int) -> None:
        """Raise `InputError` naming the first block whose output is not finite."""
        for block, tensor in sorted(features.items()):
            if not torch.isfinite(tensor).all():
                raise InputError(
                    f"block {block} gives NaN or infinite values on calibration batch {index}",
                    "try --dtype float32, or check the checkpoint",
                )


def mean_tokens(calibration: Calibration) -> float:
    """Mean number of real tokens of an example; for images the length of the first block's output."""
    batch = calibration.batch(0)
    if batch.valid is not None:
        total = sum(int(b.valid.sum()) for b in calibration.batches if b.valid is not None)
        return total / calibration.batches.count
    outputs: dict[int, Tensor] = {}
    with torch.no_grad(), block_outputs(calibration.model, outputs):
        calibration.model.output({k: v[:1] for k, v in batch.inputs.items()})
    return float(outputs[0].shape[1])
