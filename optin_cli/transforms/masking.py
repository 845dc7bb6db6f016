"""Mask units: multiply the input of the consumer, or of what reads the units before it, by a 0/1 vector.

A masked head and a zeroed context vector are the same thing (docs/method.md, section 1), so a masked model computes
what the sliced one will.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from optin_cli.structure.anatomy import Anatomy, Site
from optin_cli.structure.layers import along
from optin_cli.transforms.slicing import part_rows


@contextmanager
def masked(model: nn.Module, anatomy: Anatomy, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the context, `model` runs with `masks`: site name -> factor for each unit, shape (units,).

    Gradients flow into the masks when they ask for them. Sites that are not named run whole; of those that are named
    and to be cut to a lower rank, the last dimensions are masked, too.
    """
    with ExitStack() as stack:
        for name, mask in masks.items():
            site = anatomy[name]
            if mask.shape != (site.units,):
                raise ValueError(f"{name}: a mask of shape {tuple(mask.shape)} for {site.units} units")
            entry = model.get_submodule(site.entry)
            factor = mask.repeat_interleave(site.width)
            if site.rank:
                stays = torch.zeros(site.units, site.width, device=mask.device)
                stays[:, : site.rank] = 1
                factor = factor * stays.flatten()
                stack.enter_context(_without_dimensions(model, site))
            stack.enter_context(_hooked(entry, along(site.axis, factor)))
        yield


@contextmanager
def _without_dimensions(model: nn.Module, site: Site) -> Iterator[None]:
    """Within the context, keys have no more than the dimensions that stay: those of the queries then meet zeros."""
    producer, part = site.attended[1]
    everything = torch.arange(site.units)
    stays = part_rows(site, producer, part, everything)
    rows = part_rows(replace(site, rank=0), producer, part, everything)
    gone = rows[~torch.isin(rows, stays)]

    def cut(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.index_fill(-1, gone.to(output.device), 0.0)

    handle = model.get_submodule(producer.path).register_forward_hook(cut)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _hooked(entry: nn.Module, factor: Tensor) -> Iterator[None]:
    def multiply(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0] * factor.to(args[0].dtype), *args[1:])

    handle = entry.register_forward_pre_hook(multiply)
    try:
        yield
    finally:
        handle.remove()


def masks_from_keep(
    anatomy: Anatomy, keep: Mapping[str, list[int]], device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """0/1 masks of shape (units,) from the kept unit indices of each site."""
    masks = {}
    for name, indices in keep.items():
        mask = torch.zeros(anatomy[name].units, device=device)
        mask[torch.as_tensor(indices, dtype=torch.long, device=device)] = 1
        masks[name] = mask
    return masks
