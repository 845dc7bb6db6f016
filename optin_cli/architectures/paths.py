"""Put a family's tables into a block: paths from the model, and what a chain's table leaves out filled in.

A chain has no residual: the units of a site are the outputs of one layer and the inputs of the next one, which may
be in another block. Modules are registered in the order they run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from optin_cli.architectures.schema import SiteTable, TokenTable
from optin_cli.structure.anatomy import Producer
from optin_cli.structure.fields import map_paths
from optin_cli.structure.layers import carries_units, holds_units, passes_units

if TYPE_CHECKING:
    from torch import nn

Table = TypeVar("Table", SiteTable, TokenTable)
LINKED = 0
"""A unit width: as many features as the consumer reads of each output of the producer."""


def joined(block: str, path: str) -> str:
    """Return the path from the model of the module at `path` in a block; '' is the block itself."""
    return ".".join(filter(None, (block, path)))


def within(block: str, path: str) -> str:
    """A path from the model as seen from a block, the inverse of `joined`; others stay as they are."""
    return "" if path == block else path.removeprefix(f"{block}.")


def placed(table: Table, block: str) -> Table:
    """`table` with paths from the model."""
    return map_paths(table, lambda path: joined(block, path))


def linked(model: nn.Module, table: SiteTable, blocks: Sequence[str]) -> SiteTable | None:
    """A placed table without producers, completed by the Linear or Conv2d that runs before its consumer.

    None where the blocks up to there hold no such layer, or where something on the way may mix its outputs.
    """
    from torch import nn

    leaves = [
        (joined(block, path), module)
        for block in blocks
        for path, module in model.get_submodule(block).named_modules()
        if carries_units(module) or not any(module.children())
    ]
    paths = [path for path, _ in leaves]
    carried: list[str] = []
    for path, module in reversed(leaves[: paths.index(table.consumer)]):
        if isinstance(
            module, nn.Linear | nn.Conv2d
        ):  # one channel is left of a whole or a depthwise one alike
            return replace(
                table, producers=(Producer(path),), carried=tuple(reversed(carried)), unit_width=LINKED
            )
        if not passes_units(module):
            return None
        if holds_units(module):
            carried.append(path)
    return None


def passing_blocks(model: nn.Module, blocks: Sequence[str]) -> tuple[int, ...]:
    """Return blocks whose outputs don't count as features: a norm, activation or pooling follows, whose output does."""
    passive = [passes_units(model.get_submodule(path)) for path in blocks]
    return tuple(index for index in range(len(blocks) - 1) if passive[index + 1])
