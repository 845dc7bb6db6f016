"""Peak memory of one forward, and bytes on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from optin_cli.execution.peak_memory import activation_peak, storages
from optin_cli.loading.checkpoint import OpenModel


def peak_memory(model: OpenModel, inputs: Mapping[str, Tensor]) -> int:
    """Bytes of the weights plus the peak of live activations during one forward without gradients.

    The inputs are not counted, nor is any other model on the device. On CUDA the allocator is asked, on other
    devices every op is watched, so there the scratch space inside a kernel is not seen.
    """

    def forward() -> None:
        with torch.no_grad():
            model.run(inputs)

    peak = _cuda_peak(forward, model.device) if model.device.type == "cuda" else activation_peak(forward)
    return weight_bytes(model.module) + peak


def weight_bytes(module: torch.nn.Module) -> int:
    """Bytes of parameters and buffers; tied ones count once."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum({s._cdata: s.nbytes() for s in storages(tensors)}.values())


def disk_bytes(model: OpenModel) -> int | None:
    """Size of the model's weight files, or of its exported file; None for a model made by name, without files."""
    if model.runtime is not None:
        return int(model.runtime.bytes)
    files = model.source.weight_files()
    return sum(file.stat().st_size for file in files) if files else None


def _cuda_peak(function: Callable[[], Any], device: torch.device) -> int:
    function()  # the first call allocates library workspaces, which stay
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
