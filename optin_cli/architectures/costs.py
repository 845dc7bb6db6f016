"""Costs of one unit in each of the modules that a site's table names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optin_cli.architectures.schema import SiteTable
from optin_cli.structure.anatomy import Site
from optin_cli.structure.coupled_layers import CoupledLayer
from optin_cli.structure.layers import carried_weights, shape_of

if TYPE_CHECKING:
    from torch import nn

    from optin_cli.architectures.positions import Positions


@dataclass(frozen=True)
class Cost:
    """The cost of one unit in one module."""

    path: str
    macs: float
    """For each position of the module's output."""
    params: float
    base: bool = False
    """It is there as long as one unit is, and no unit's own."""


def unit_costs(
    table: SiteTable,
    width: int,
    group: int,
    spread: int,
    module: Callable[[str], nn.Module],
    ends: Mapping[str, int],
    one_group: bool = False,
) -> Iterator[Cost]:
    """Costs of a unit, `width` inputs of the consumer and `group` heads, `spread` inputs for each output of a producer,
    in all the modules that a table names.

    `ends` says how many sites begin or end at a layer; `one_group` that a shared producer belongs to no unit alone.
    A layer between two sites costs as much as the product of their units. Either has half of it: the sum is right
    for the whole layer, and never less than what is left when both lose units.
    """
    rows = width // spread
    for path in table.consumer, *table.readers:
        shape = shape_of(module(path), path)
        weights = width * shape.taps * shape.outputs / ends.get(path, 1)
        yield Cost(path, weights, weights)
    for producer in table.producers:
        shape = shape_of(module(producer.path), producer.path)
        made = producer.parts * producer.rows_of(rows, group)
        weights = made * shape.taps * shape.inputs / ends.get(producer.path, 1)
        macs = 0 if producer.per_batch else weights
        yield Cost(producer.path, macs, weights + made * shape.biased, one_group and producer.shared)
    for path in table.carried:
        macs, params = carried_weights(module(path))
        yield Cost(path, rows * macs, rows * params)


def coupled_layers(
    model: nn.Module, sites: Sequence[Site], seen: Positions | None
) -> tuple[CoupledLayer, ...]:
    """The layers that make the units of one site from those of another."""
    found = []
    for site in sites:
        for producer in site.producers:
            for other in sites:
                if other.consumer == producer.path:
                    shape = shape_of(model.get_submodule(producer.path), producer.path)
                    weights = producer.parts * site.rows * other.width * shape.taps
                    share = seen.share(producer.path) if seen else 1
                    found.append(CoupledLayer(site.name, other.name, plain(weights * share), weights))
    return tuple(found)


def plain(value: float) -> float:
    """An int where it is one: costs of most sites are whole numbers."""
    return int(value) if value == int(value) else value
