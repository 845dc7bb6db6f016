"""Run one block at a time on all calibration batches, holding little: what feeds a block is kept, spilled, replaced.

Chained blocks are called with the arguments the model itself gave them (masks, position biases), recorded once, and
with hidden states of our own. Where blocks are not chained, the whole model runs, as far as the block in question.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import cycle
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from optin_cli.data.batches import Batch, Batches
from optin_cli.errors import InputError, param
from optin_cli.execution.activation_cache import ActivationCache, StoredTensor
from optin_cli.execution.block_runs import OUTPUT, Place, arguments_of, run_block, run_to
from optin_cli.execution.hooks import by_module
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.structure.hidden_states import Arguments, hidden_argument, hidden_of, with_hidden

Found = TypeVar("Found")


class BlockCalls:
    """The arguments of each block on each batch, apart from the hidden states."""

    def __init__(self, model: OpenModel, store: ActivationCache) -> None:
        self.model = model
        self.store = store
        self.calls: dict[tuple[int, int], Arguments] = {}
        self.dims: dict[int, int] = {}
        """Dimensions of the hidden states that a block receives."""
        self.tail: tuple[Any, ...] | None = None
        """The elements of a block's output behind the hidden states; None if it is a plain tensor."""
        self.reshaping = False
        """True if a block's output differs in shape from its input: then nothing can pass through the blocks."""

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
            return StoredTensor(key)

        def passing(blocks: list[int], run: Callable[..., Any]) -> Any:
            turns = cycle(blocks)

            def forward(*args: Any, **kwargs: Any) -> Any:
                block, hidden = next(turns), hidden_argument(args, kwargs)
                if not first:
                    first.append(hidden)
                self.dims[block] = hidden.dim()
                rest, named = with_hidden((args, kwargs), None)
                self.calls[block, index] = (
                    tuple(keep(value) for value in rest),
                    {name: keep(value) for name, value in named.items()},
                )
                if self.reshaping:
                    return run(*args, **kwargs)
                return self._given(hidden)

            return forward

        with ExitStack() as stack:
            for module, blocks in by_module(self.model.module, self.model.anatomy.blocks).items():
                stack.enter_context(_replaced(module, passing(blocks, module.forward)))
            self.model.output(batch.inputs)
        return first[0]

    def _given(self, hidden: Tensor) -> Any:
        """What a block gives around its hidden states."""
        return hidden if self.tail is None else (hidden, *self.tail)

    def _look(self, batch: Batch) -> None:
        """Run the model once to see what its blocks give. Raises `InputError` where one is not given what the one
        before gives."""
        given: list[Tensor] = []

        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            hidden = hidden_argument(args, kwargs)
            before = given.pop() if given else hidden
            same = hidden.shape != before.shape or torch.allclose(hidden, before, 0, 0, equal_nan=True)
            if not same:  # values that are not finite are reported later, with their block
                raise InputError(
                    f"{self.model.spec} changes hidden states between its blocks, so they can't be refitted one by one",
                    f"leave it out with {param('compensate', 'none')}",
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

    @torch.no_grad()
    def finish(self, batch: Batch, module: nn.Module, hidden: Tensor) -> None:
        """Run `module` on a batch with `hidden` behind its last block, and no block; all of it where blocks reshape."""
        last = len(self.model.anatomy.blocks) - 1

        def passing(blocks: list[int]) -> Callable[..., Any]:
            turns = cycle(blocks)

            def forward(*args: Any, **kwargs: Any) -> Any:
                here = hidden if next(turns) == last else hidden_argument(args, kwargs)
                there = here.to(self.model.device, copy=True)
                return self._given(there)

            return forward

        with ExitStack() as stack:
            for block, uses in by_module(module, self.model.anatomy.blocks).items():
                if not self.reshaping:
                    stack.enter_context(_replaced(block, passing(uses)))
            self.model.output(batch.inputs, module)

    def arguments(self, block: int, index: int, hidden: Tensor) -> Arguments:
        """The arguments of a block on a batch, with `hidden` (anywhere) moved to the model's device.

        What the block before gave is flattened where the model does that between them. It is a copy: activations may
        work in place.
        """
        device = self.model.device
        if hidden.dim() > self.dims[block]:
            hidden = hidden.flatten(self.dims[block] - 1)

        def fetch(value: Any) -> Any:
            return self.store[value.key].to(device) if isinstance(value, StoredTensor) else value

        args, kwargs = self.calls[block, index]
        found = tuple(fetch(value) for value in args), {name: fetch(v) for name, v in kwargs.items()}
        return with_hidden(found, hidden.to(device, copy=True))


class BlockRunner(Protocol):
    """Runs the blocks of one model in order, each on all batches before the next."""

    def arguments(self, block: int, index: int) -> Arguments:
        """Return what a block receives on batch `index`."""

    def run(
        self, block: int, index: int, places: Collection[Place], *, stop: bool = False
    ) -> dict[Place, Tensor]:
        """The tensors at `places` of a block. With `stop`, nothing behind the last of them need run."""

    def advance(self, block: int, index: int, output: Tensor | None = None) -> None:
        """Go on behind a block that gave `output` on batch `index`; without it, what it gives now."""

    def place(self, index: int) -> Tensor | None:
        """Return its state on batch `index`, for `begin`."""

    def begin(self, index: int, hidden: Tensor | None) -> None:
        """Go back to a place."""

    def finish(self, index: int, batch: Batch) -> None:
        """Run what stands behind the last block, which has given its output: for what watches layers there."""


class ChainedStream:
    """Blocks of which each is run on what the one before gave. `calls` says how they are called."""

    def __init__(self, module: nn.Module, calls: BlockCalls, name: str) -> None:
        self.module = module
        self.calls = calls
        self.name = name
        """Under which its hidden states are in the store."""

    def place(self, index: int) -> Tensor | None:
        return self.calls.store[self.name, index]

    def begin(self, index: int, hidden: Tensor | None) -> None:
        assert hidden is not None
        self.calls.store[self.name, index] = hidden

    def arguments(self, block: int, index: int) -> Arguments:
        return self.calls.arguments(block, index, self.calls.store[self.name, index])

    def finish(self, index: int, batch: Batch) -> None:
        self.calls.finish(batch, self.module, self.calls.store[self.name, index])

    def run(
        self, block: int, index: int, places: Collection[Place], *, stop: bool = False
    ) -> dict[Place, Tensor]:
        module = self.module.get_submodule(self.calls.model.anatomy.blocks[block])
        return run_block(module, self.arguments(block, index), places, stop=stop)

    def advance(self, block: int, index: int, output: Tensor | None = None) -> None:
        self.begin(index, self.run(block, index, (OUTPUT,))[OUTPUT] if output is None else output)


class KeptInputs:
    """The batches of a data set as the model reads them, decoded once: every run of a model would decode them again."""

    def __init__(self, store: ActivationCache) -> None:
        self.store = store
        self.names: dict[int, list[str]] = {}
        """Of the inputs of each batch."""

    def keep(self, index: int, batch: Batch) -> None:
        self.names[index] = list(batch.inputs)
        for name, tensor in batch.inputs.items():
            self.store["input", index, name] = tensor

    def batch(self, index: int) -> Batch:
        """The inputs of a batch, in tensors of their own."""
        inputs = {name: self.store["input", index, name].clone() for name in self.names[index]}
        return Batch(inputs, None, [])


class UnchainedStream:
    """Blocks that are run within the whole model. Those behind it do not run again: they give what they gave."""

    def __init__(
        self, model: OpenModel, module: nn.Module, inputs: KeptInputs, store: ActivationCache, name: str
    ) -> None:
        self.model = model
        self.module = module
        self.inputs = inputs
        self.store = store
        self.name = name
        self.gave: dict[int, dict[int, Any]] = {}
        """Batch -> block -> its output, tensors `StoredTensor`."""
        self.last: Any = None
        """The output of the block that ran last, where it ran to its end."""

    def _run(self, block: int, index: int, see: Callable[[Callable[[], Any], nn.Module], Found]) -> Found:
        """Return what `see` finds, given a run of the model and the block."""
        inputs = self.inputs.batch(index).to(self.model.device, self.model.dtype).inputs
        with ExitStack() as stack:
            for passed, output in self.gave.get(index, {}).items():
                stack.enter_context(_replaced(self._block(passed), partial(self._again, output)))
            return see(lambda: self.model.output(inputs, self.module), self._block(block))

    def _again(self, output: Any, *_: object, **__: object) -> Any:
        return _mapped(
            output, StoredTensor, lambda kept: self.store[kept.key].to(self.model.device, copy=True)
        )

    def _block(self, block: int) -> nn.Module:
        return self.module.get_submodule(self.model.anatomy.blocks[block])

    def arguments(self, block: int, index: int) -> Arguments:
        return self._run(block, index, arguments_of)

    def run(
        self, block: int, index: int, places: Collection[Place], *, stop: bool = False
    ) -> dict[Place, Tensor]:
        def hear(_: nn.Module, __: Any, output: Any) -> None:
            self.last = output

        def see(run: Callable[[], Any], module: nn.Module) -> dict[Place, Tensor]:
            # before the places are watched: the last one of them ends the run
            handle = module.register_forward_hook(hear)
            try:
                return run_to(run, module, places, stop=True)  # nothing behind the block is ever needed
            finally:
                handle.remove()

        return self._run(block, index, see)

    def advance(self, block: int, index: int, output: Tensor | None = None) -> None:
        if output is None:
            self.run(block, index, (OUTPUT,))
        count = 0

        def keep(tensor: Tensor) -> StoredTensor:
            nonlocal count
            key, count = (self.name, block, index, count), count + 1
            self.store[key] = tensor
            return StoredTensor(key)

        self.gave.setdefault(index, {})[block] = _mapped(self.last, Tensor, keep)
        self.last = None

    def place(self, index: int) -> None:
        return None

    def begin(self, *_: object) -> None:
        """Nothing to do: every run begins at the inputs."""

    def finish(self, index: int, batch: Batch) -> None:
        self._run(len(self.model.anatomy.blocks) - 1, index, lambda run, _: run())


def _mapped(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """A block's output with everything of a kind in its tuples and lists changed."""
    if isinstance(value, kind):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(part, kind, change) for part in value)
    return value


def read_streams(
    model: OpenModel,
    pruned: nn.Module,
    teacher: OpenModel,
    batches: Batches,
    store: ActivationCache,
    on_batch: Callable[[int, Batch], None],
) -> tuple[BlockRunner, BlockRunner]:
    """Go through the data once; returns what runs the blocks of `teacher`, and of `pruned`, a sliced `model`."""
    chained = model.anatomy.chained
    calls = BlockCalls(model, store)
    # a pruned model calls its blocks as the dense one does, but for what it computes outside them
    dense_calls = calls if teacher is model else BlockCalls(teacher, store)
    ours, theirs = ChainedStream(pruned, calls, "pruned"), ChainedStream(teacher.module, dense_calls, "dense")
    inputs = KeptInputs(store)
    for index, read in enumerate(batches):
        batch = read.to(model.device, model.dtype)
        if not chained:
            inputs.keep(index, read)
        else:
            first = calls.record(index, batch)
            ours.begin(index, first)
            theirs.begin(index, first if dense_calls is calls else dense_calls.record(index, batch))
        on_batch(index, batch)
    if chained:
        return theirs, ours
    return (
        UnchainedStream(teacher, teacher.module, inputs, store, "dense"),
        UnchainedStream(model, pruned, inputs, store, "pruned"),
    )


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
