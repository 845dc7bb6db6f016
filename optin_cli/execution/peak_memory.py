"""Watch the tensors that a piece of code creates, by their storages: what it holds at once, on any device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def activation_peak(function: Callable[[], Any]) -> int:
    """Peak bytes of the tensors that `function` creates, counted by storage: a view costs nothing."""
    with LiveStorages() as watch:
        function()
    return watch.peak


class LiveStorages(TorchDispatchMode):
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
        given = {storage._cdata for storage in storages((args, kwargs))}
        for key, storage in {s._cdata: s for s in storages(result)}.items():
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


def free_gpu_bytes(devices: Iterable[torch.device]) -> int:
    """Bytes that can be had on the GPUs among `devices`; what torch holds unused counts as free. 0 without a GPU."""
    gpus = {device for device in devices if device.type == "cuda"}
    unused = sum(torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu) for gpu in gpus)
    return sum(torch.cuda.mem_get_info(gpu)[0] for gpu in gpus) + unused


def storages(values: Any) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
