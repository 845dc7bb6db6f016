"""Run one block at a time on all calibration batches, holding little: what feeds a block is kept, spilled, replaced.

Blocks are called with the arguments the model itself gave them (masks, position biases), recorded once, and
with hidden states of our own.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from optin_cli.artefacts.files import disk_is_full
from optin_cli.data.batches import Batch
from optin_cli.errors import InputError
from optin_cli.models.checkpoint import OpenModel
from optin_cli.models.hidden import Arguments, hidden_argument, hidden_of, with_hidden
from optin_cli.models.uses import by_module


class Store:
    """Tensors by key: in main memory up to `memory` bytes, the rest on disk. A context: the disk part is removed."""

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.held: dict[Hashable, Tensor] = {}
        self.spilled: dict[Hashable, Path] = {}
        self.used = 0
        self.folder: Path | None = None
        self.written = 0

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.held.clear()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def __setitem__(self, key: Hashable, tensor: Tensor) -> None:
        self.drop(key)
        size = tensor.numel() * tensor.element_size()
        if self.used + size <= self.memory:
            self.held[key] = tensor.cpu()
            self.used += size
            return
        if self.folder is None:
            self.folder = Path(tempfile.mkdtemp(prefix="optin-"))
        path = self.folder / str(self.written)
        self.written += 1
        try:
            save_file({"tensor": tensor.cpu().contiguous()}, path)
        except Exception as error:
            if disk_is_full(error):
                raise InputError(
                    f"the disk is full: activations could not be spilled to {self.folder}",
                    "free some space there, point TMPDIR elsewhere, or raise --memory",
                ) from error
            raise
        self.spilled[key] = path

    def __getitem__(self, key: Hashable) -> Tensor:
        return self.held[key] if key in self.held else load_file(self.spilled[key])["tensor"]

    def drop(self, key: Hashable) -> None:
        """Forget a tensor, if it is there."""
        tensor = self.held.pop(key, None)
        if tensor is not None:
            self.used -= tensor.numel() * tensor.element_size()
        path = self.spilled.pop(key, None)
        if path is not None:
            path.unlink()

    def pop(self, key: Hashable) -> Tensor:
        tensor = self[key]
        self.drop(key)
        return tensor


class _Stored:
    """Stands for a tensor argument that the store holds."""

    def __init__(self, key: Hashable) -> None:
        self.key = key


class BlockCalls:
    """How the model calls each of its blocks on each batch, apart from the hidden states."""

    def __init__(self, model: OpenModel, store: Store) -> None:
        self.model = model
        self.store = store
        self.calls: dict[tuple[int, int], Arguments] = {}
        self.tail: tuple[Any, ...] | None = None
        """What a block's output holds beside the hidden states; None if it is a plain tensor."""
        self.reshaping = False
        """Whether a block's output differs in shape from its input: then nothing can pass through the blocks."""

    @torch.no_grad()
    def record(self, index: int, batch: Batch) -> Tensor:
        """Remember the calls of batch `index`; returns the hidden states that the first block receives.

        The blocks themselves do not run, each passes on what it receives; unless some change its shape.
        """
        if not self.calls:
            self._look(batch)
        first: list[Tensor] = []
        held: dict[int, Tensor] = {}  # one tensor is often given to all blocks: stored once

        def keep(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            key = ("argument", id(self), index, id(value))
            if id(value) not in held:
                held[id(value)] = value
                self.store[key] = value
            return _Stored(key)

        def passing(blocks: list[int], run: Callable[..., Any]) -> Any:
            turns = cycle(blocks)

            def forward(*args: Any, **kwargs: Any) -> Any:
                block, hidden = next(turns), hidden_argument(args, kwargs)
                if not first:
                    first.append(hidden)
                rest, named = with_hidden((args, kwargs), None)
                self.calls[block, index] = (
                    tuple(keep(value) for value in rest),
                    {name: keep(value) for name, value in named.items()},
                )
                if self.reshaping:
                    return run(*args, **kwargs)
                return hidden if self.tail is None else (hidden, *self.tail)

            return forward

        with ExitStack() as stack:
            for module, blocks in by_module(self.model.module, self.model.anatomy.blocks).items():
                stack.enter_context(_replaced(module, passing(blocks, module.forward)))
            self.model.output(batch.inputs)
        return first[0]

    def _look(self, batch: Batch) -> None:
        """Run the model once to see what its blocks give. Raises `InputError` where one is not given what the one
        before gives."""
        given: list[Tensor] = []

        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            hidden = hidden_argument(args, kwargs)
            if given and not torch.equal(hidden, given.pop()):
                raise InputError(
                    f"{self.model.spec} changes hidden states between its blocks, so they can't be refitted one by one",
                    "leave it out with --compensate none",
                )
            given.append(hidden_of(output))
            self.reshaping |= hidden_of(output).shape != hidden.shape

        def see_first(_: nn.Module, __: Any, output: Any) -> None:
            self.tail = None if isinstance(output, Tensor) else tuple(output[1:])

        blocks = list(by_module(self.model.module, self.model.anatomy.blocks))
        with ExitStack() as stack:
            stack.callback(blocks[0].register_forward_hook(see_first).remove)
            for block in blocks:
                stack.callback(block.register_forward_hook(see, with_kwargs=True).remove)
            self.model.output(batch.inputs)

    def arguments(self, block: int, index: int, hidden: Tensor) -> Arguments:
        """The arguments of a block on a batch, with `hidden` (anywhere) moved to the model's device."""
        device = self.model.device

        def fetch(value: Any) -> Any:
            return self.store[value.key].to(device) if isinstance(value, _Stored) else value

        args, kwargs = self.calls[block, index]
        found = tuple(fetch(value) for value in args), {name: fetch(v) for name, v in kwargs.items()}
        return with_hidden(found, hidden.to(device))


@contextmanager
def _replaced(module: nn.Module, forward: Any) -> Iterator[None]:
    earlier = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if earlier is not None:
            module.forward = earlier
