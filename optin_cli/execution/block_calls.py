"""Record how a model calls its blocks, so that one of them, or several in a row, can be called alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from optin_cli.architectures.paths import joined, within
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.structure.anatomy import Site
from optin_cli.structure.fields import map_paths
from optin_cli.structure.hidden_states import CACHES

Call = Callable[[], object]


@dataclass
class BlockCall:
    """The arguments that the model calls one block with."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        given = (*self.args, *self.kwargs.values())
        return tuple(tuple(value.shape) for value in given if isinstance(value, Tensor))

    def on(self, module: nn.Module) -> Call:
        return lambda: module(*self.args, **self.kwargs)


def block_calls(model: OpenModel, inputs: Mapping[str, Tensor]) -> list[BlockCall]:
    """One forward, looking at what each block is given."""
    found: dict[int, BlockCall] = {}

    def look(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # a cache grows at every call
            plain = {k: None if k in CACHES else v for k, v in kwargs.items()}
            found[index] = BlockCall(module, args, plain)

        return hook

    handles = [
        model.module.get_submodule(path).register_forward_pre_hook(look(index), with_kwargs=True)
        for index, path in enumerate(model.anatomy.blocks)
    ]
    try:
        model.run(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [found[index] for index in range(len(handles))]


class _Run(nn.Module):
    """Blocks one after another, as the model runs them."""

    def __init__(self, calls: Sequence[BlockCall]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(call.module for call in calls)
        self.dims = [call.args[0].dim() for call in calls]

    def forward(self, hidden: Tensor) -> Tensor:
        for block, dims in zip(self.blocks, self.dims, strict=True):
            hidden = block(hidden.flatten(dims - 1) if hidden.dim() > dims else hidden)
        return hidden


def first_block(model: OpenModel, site: Site) -> int:
    """The block of a site's producers."""
    path = site.producers[0].path
    blocks = model.anatomy.blocks[: site.block]
    return next((i for i, b in enumerate(blocks) if within(b, path) != path), site.block)


def around(model: OpenModel, site: Site, calls: Sequence[BlockCall]) -> tuple[Site, BlockCall]:
    """The call that runs all of a site, and the site as seen from the module that is called."""
    first, blocks = first_block(model, site), model.anatomy.blocks
    if first == site.block:
        return _seen_from(site, {blocks[first]: ""}), calls[first]
    places = {blocks[index]: f"blocks.{index - first}" for index in range(first, site.block + 1)}
    run = _Run(calls[first : site.block + 1]).eval()
    return _seen_from(site, places), replace(calls[first], module=run)


def _seen_from(site: Site, places: Mapping[str, str]) -> Site:
    """Return `site` with other paths: block -> its path."""

    def cut(path: str) -> str:
        for block, place in places.items():
            if path and (inner := within(block, path)) != path:
                return joined(place, inner)
        return path

    return map_paths(site, cut)
