"""Peak memory of one forward, and bytes on disk."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from optin_cli.models.checkpoint import OpenModel


def peak_memory(model: OpenModel, inputs: Mapping[str, Tensor]) -> int:
    """Bytes of the weights plus the peak of live activations during one forward without gradients.

    The inputs are not counted, nor is any other model on the device. On CUDA the allocator is asked, on other
    devices every op is watched, so there the scratch space inside a kernel is not seen.
    """

    def forward() -> None:
        with torch.no_grad():
            model.module(**inputs)

    peak = _cuda_peak(forward, model.device) if model.device.type == "cuda" else activation_peak(forward)
    return weight_bytes(model.module) + peak


def weight_bytes(module: torch.nn.Module) -> int:
    """Bytes of parameters and buffers; tied ones count once."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum({s._cdata: s.nbytes() for s in _storages(tensors)}.values())


def disk_bytes(model: OpenModel) -> int | None:
    """Size of the model's weight files; None for a model made by name, without files."""
    files = model.source.weight_files()
    return sum(file.stat().st_size for file in files) if files else None


def activation_peak(function: Callable[[], Any]) -> int:
    """Peak bytes of the tensors that `function` creates, counted by storage: a view costs nothing."""
    with _LiveStorages() as watch:
        function()
    return watch.peak


def _cuda_peak(function: Callable[[], Any], device: torch.device) -> int:
    function()  # the first call allocates library workspaces, which stay
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


class _LiveStorages(TorchDispatchMode):
    """Adds up the storages that ops create, for as long as each lives."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # a view or an in-place result shares the storage of an argument, perhaps of a weight
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for key, storage in {s._cdata: s for s in _storages(result)}.items():
            if key not in given:
                self._track(storage)
        self.peak = max(self.peak, self.live)
        return result

    def _track(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.live += size
        weakref.finalize(storage, self._forget, size).atexit = False

    def _forget(self, size: int) -> None:
        self.live -= size


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
