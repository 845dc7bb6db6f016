"""Find the tokens of the last block that the model's output is made from, by gradient instead of by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from optin_cli.data.batches import Batch
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.structure.hidden_states import as_rows, hidden_of, output_with


def read_positions(model: OpenModel, batch: Batch, seed: int = 0) -> list[int] | None:
    """Positions that alone are read in every example (a class token: [0]); None where they all are, or it varies."""
    if model.task.sampled:
        return None  # rows that the sample leaves out read other tokens
    leaves: list[Tensor] = []

    def cut(_: nn.Module, __: Any, output: Any) -> Any:
        hidden = hidden_of(output).detach().requires_grad_()
        leaves[:] = [hidden]  # of the last block, where several share a module
        return output_with(output, hidden)

    last = model.module.get_submodule(model.anatomy.blocks[-1])
    handle = last.register_forward_hook(cut)
    try:
        with torch.enable_grad():
            output = model.output(batch.inputs)  # (examples, rows, classes)
            generator = torch.Generator().manual_seed(seed)
            direction = torch.randn(output.shape, generator=generator).to(output.device)
            (gradient,) = torch.autograd.grad((output * direction).sum(), leaves)
    finally:
        handle.remove()
    stream = model.anatomy.stream_of(-1)
    read = as_rows(gradient, stream.layout).abs().amax(-1) > 0  # (examples, tokens)
    real = batch.real(stream.mask)
    valid = torch.ones_like(read) if real is None else real
    always = (read | ~valid).all(0) & read.any(0)
    if bool((read & ~always).any()) or bool((always | ~valid.any(0)).all()):
        return None
    return always.nonzero()[:, 0].tolist()
