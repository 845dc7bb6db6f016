"""Blocks that share a module: it runs once for each of them, in their order (ALBERT)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import cycle
from typing import Any

from torch import Tensor, nn

from optin_cli.loading.checkpoint import OpenModel
from optin_cli.structure.hidden_states import as_rows, hidden_of


def by_module(model: nn.Module, blocks: Sequence[str]) -> dict[nn.Module, list[int]]:
    """Module -> the indices of the blocks that it runs as."""
    found: dict[nn.Module, list[int]] = {}
    for index, path in enumerate(blocks):
        found.setdefault(model.get_submodule(path), []).append(index)
    return found


@contextmanager
def on_blocks(
    model: nn.Module, blocks: Sequence[str], hook: Callable[..., Any], before: bool = False
) -> Iterator[None]:
    """Within the context, `hook(index, module, args, kwargs[, output])` hears of every block that runs.

    What the hook returns replaces the output, or with `before` the arguments, as torch's hooks do.
    """
    with ExitStack() as stack:
        for module, indices in by_module(model, blocks).items():
            turns = cycle(indices)

            def heard(*arguments: Any, turns: Iterator[int] = turns) -> Any:
                return hook(next(turns), *arguments)

            register = module.register_forward_pre_hook if before else module.register_forward_hook
            stack.callback(register(heard, with_kwargs=True).remove)
        yield


@contextmanager
def block_outputs(model: OpenModel, outputs: dict[int, Tensor], first: int = 0) -> Iterator[None]:
    """Within the context, collect what blocks `first`.. give, by block index: (batch, positions, d)."""

    def keep(index: int, _: nn.Module, __: Any, ___: Any, output: Any) -> None:
        if index >= first:
            outputs[index] = as_rows(hidden_of(output), model.anatomy.stream_of(index).layout)

    with on_blocks(model.module, model.anatomy.blocks, keep):
        yield
