"""Put a family's tables into a block: paths from the model, and what a chain's table leaves out filled in.

A chain has no residual: the units of a site are the outputs of one layer and the inputs of the next one, which may
stand in another block. Modules are registered in the order they run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from optin_cli.models.anatomy import Producer
from optin_cli.models.layers import carries_units, holds_units, passes_units
from optin_cli.models.tables import SiteTable

if TYPE_CHECKING:
    from torch import nn

LINKED = 0
"""A unit width: as many features as the consumer reads of each output of the producer."""


def joined(block: str, path: str) -> str:
    """The path from the model of what stands at `path` in a block; '' is the block itself."""
    return ".".join(filter(None, (block, path)))


def within(block: str, path: str) -> str:
    """A path from the model as seen from a block, the inverse of `joined`; others stay as they are."""
    return "" if path == block else path.removeprefix(f"{block}.")


def placed(table: SiteTable, block: str) -> SiteTable:
    """`table` with paths from the model."""

    def full(path: str) -> str:
        return joined(block, path)

    width = table.unit_width
    return replace(
        table,
        producers=tuple(replace(p, path=full(p.path)) for p in table.producers),
        consumer=full(table.consumer),
        carried=tuple(map(full, table.carried)),
        readers=tuple(map(full, table.readers)),
        masked_at=full(table.masked_at) if table.masked_at else "",
        norm=full(table.norm) if table.norm else "",
        unit_width=full(width) if isinstance(width, str) else width,
        unit_count=full(table.unit_count) if table.unit_count else "",
        group=full(table.group) if table.group else "",
        counts={full(path): unit for path, unit in table.counts.items()},
        unit_inputs=tuple(replace(u, module=full(u.module)) for u in table.unit_inputs),
        tensors={full(path): axis for path, axis in table.tensors.items()},
        relative=replace(
            table.relative,
            kinds=full(table.relative.kinds),
            rows=full(table.relative.rows) if table.relative.rows else "",
        )
        if table.relative
        else None,
        bypass=replace(table.bypass, module=full(table.bypass.module)) if table.bypass else None,
        must_be_identity=tuple(map(full, table.must_be_identity)),
        requires=tuple(map(full, table.requires)),
    )


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
    """Blocks whose outputs are no features: before a mere norm, activation or pooling, whose output counts."""
    passive = [passes_units(model.get_submodule(path)) for path in blocks]
    return tuple(index for index in range(len(blocks) - 1) if passive[index + 1])
