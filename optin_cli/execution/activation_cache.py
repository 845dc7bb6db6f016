"""Tensors by key that need not all fit into a GPU's memory, or into main memory."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import ExitStack
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from optin_cli.artefacts.files import disk_is_full
from optin_cli.artefacts.temporary import scratch
from optin_cli.errors import InputError, param


class ActivationCache:
    """Tensors by key: those of a GPU stay there up to `on_gpu` bytes, others go to main memory up to `memory` bytes,
    the rest to disk. A context: the disk part is removed."""

    def __init__(self, memory: int, on_gpu: int = 0) -> None:
        self.memory = memory
        self.on_gpu = on_gpu
        self.held: dict[Hashable, Tensor] = {}
        self.spilled: dict[Hashable, Path] = {}
        self.used = 0
        """Bytes held in main memory."""
        self.used_on_gpu = 0
        self.folder: Path | None = None
        self.on_disk = ExitStack()
        self.written = 0

    def __enter__(self) -> ActivationCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.held.clear()
        self.on_disk.close()

    def __setitem__(self, key: Hashable, tensor: Tensor) -> None:
        self.drop(key)
        size = tensor.numel() * tensor.element_size()
        if tensor.is_cuda and self.used_on_gpu + size <= self.on_gpu:
            self.held[key] = tensor
            self.used_on_gpu += size
            return
        if self.used + size <= self.memory:
            self.held[key] = tensor.cpu()
            self.used += size
            return
        if self.folder is None:
            self.folder = self.on_disk.enter_context(scratch())
        path = self.folder / str(self.written)
        self.written += 1
        try:
            save_file({"tensor": tensor.cpu().contiguous()}, path)
        except Exception as error:
            if disk_is_full(error):
                raise InputError(
                    f"the disk is full: activations could not be spilled to {self.folder}",
                    f"free some space there, point TMPDIR elsewhere, or raise {param('memory')}",
                ) from error
            raise
        self.spilled[key] = path

    def __getitem__(self, key: Hashable) -> Tensor:
        return self.held[key] if key in self.held else load_file(self.spilled[key])["tensor"]

    def drop(self, key: Hashable) -> None:
        """Forget a tensor, if it is there."""
        tensor = self.held.pop(key, None)
        if tensor is not None:
            size = tensor.numel() * tensor.element_size()
            if tensor.is_cuda:
                self.used_on_gpu -= size
            else:
                self.used -= size
        path = self.spilled.pop(key, None)
        if path is not None:
            path.unlink()

    def pop(self, key: Hashable) -> Tensor:
        tensor = self[key]
        self.drop(key)
        return tensor


class StoredTensor:
    """Stands for a tensor argument that the store holds."""

    def __init__(self, key: Hashable) -> None:
        self.key = key
