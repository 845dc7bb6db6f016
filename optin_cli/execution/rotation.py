"""Models whose heads can be cut to a lower rank: the bases of their heads turned by the moments of a few examples."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from optin_cli.data.batches import Batch, Batches
from optin_cli.errors import InputError, param
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.structure.anatomy import Producer, Site
from optin_cli.structure.layers import replaces_forward
from optin_cli.transforms.rotation import HeadMoments, rotate
from optin_cli.transforms.slicing import part_rows, sharing_copy

_EXAMPLES = 256
"""Whose moments are taken: a head's bases have few numbers, and more examples turn them no further."""


def rankable(model: OpenModel) -> list[Site]:
    """The sites whose heads can be cut to a lower rank."""
    return [site for site in model.anatomy if site.ranks and site.units and site.width > 1]


def check_rankable(model: OpenModel) -> None:
    """Raise `InputError` unless some heads of the model can be cut to a lower rank."""
    if not rankable(model):
        raise InputError(
            f"{param('ranks')}: {model.spec} of family {model.family.name!r} has no heads that can be cut to a lower "
            "rank: what is between its queries and keys (rotary positions, norms) allows no other basis, or its table "
            "does not say that it does",
            f"`optin families` lists the families whose heads can be; leave {param('ranks')} out",
        )
    if replaces_forward(model.module):
        raise InputError(
            f"{model.spec} has modules whose forward is replaced (spread over devices?): its heads can't be turned",
            f"open it on one device, or leave {param('ranks')} out",
        )


def with_turned_heads(
    model: OpenModel, batches: Batches, sites: Collection[str] | None = None, *, inplace: bool = False
) -> OpenModel:
    """The same function in weights whose heads have their best dimensions first, by what they do on `batches`.

    `sites` names those to turn, by default all that can be. With `inplace` the model's own module is changed,
    otherwise a copy that shares all other tensors. Raises what `check_rankable` raises.
    """
    check_rankable(model)
    turned = [site for site in rankable(model) if sites is None or site.name in sites]
    moments = head_moments(model, some_of(batches), turned)
    with model.unmerged():
        module = model.module if inplace else sharing_copy(model.module)

    def rounded(weight: Tensor) -> Tensor:
        return weight.to(model.stored_dtype)

    with torch.no_grad():
        for site in turned:
            rotate(module, site, moments[site.name], rounded)
    return model if inplace else replace(model, module=module, merging=None)


def some_of(batches: Batches) -> Iterator[Batch]:
    """Evenly spaced batches, short texts and long ones, of about as many examples as moments need."""
    count = len(batches)
    wanted = min(count, max(1, -(-_EXAMPLES * count // max(1, batches.count))))
    chosen = dict.fromkeys(round(i * (count - 1) / max(1, wanted - 1)) for i in range(wanted))
    return (batches[index] for index in chosen)


@torch.no_grad()
def head_moments(
    model: OpenModel, batches: Iterable[Batch], sites: Collection[Site]
) -> dict[str, HeadMoments]:
    """Site name -> the moments of what its heads compute on `batches`, padding left out; on whole sequences.

    Raises `InputError` for values that are not finite.
    """
    found = {site.name: HeadMoments.zeros(site, model.device) for site in sites}
    with model.unmerged():
        for batch in batches:
            here = batch.to(model.device, model.dtype)
            with _watched(model, here, sites, found):
                model.output(here.inputs)
    for name, moments in found.items():
        sums = (moments.queries, moments.keys, moments.context)
        if not all(bool(torch.isfinite(one).all()) for one in sums):
            raise InputError(
                f"the heads of {name} give NaN or infinite values on the calibration data",
                "check the checkpoint",
            )
    return found


@contextmanager
def _watched(
    model: OpenModel, batch: Batch, sites: Collection[Site], found: Mapping[str, HeadMoments]
) -> Iterator[None]:
    """Within the context, add what the heads of `sites` compute to their moments."""
    with ExitStack() as stack:
        for site in sites:
            module, sums = model.module, found[site.name]
            (query, key, _), consumer = site.attended, module.get_submodule(site.consumer)

            def see_queries(
                _: nn.Module, __: object, out: Tensor, s: Site = site, m: HeadMoments = sums
            ) -> None:
                heads, real = _heads(model, batch, s, _part(s, s.attended[0], out))
                m.queries += _products(heads * real)

            def see_keys(
                _: nn.Module, __: object, out: Tensor, s: Site = site, m: HeadMoments = sums
            ) -> None:
                heads, real = _heads(model, batch, s, _part(s, s.attended[1], out))
                mean = (heads * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)
                m.keys += _products((heads - mean) * real)

            def see_context(
                _: nn.Module, args: tuple[Tensor, ...], s: Site = site, m: HeadMoments = sums
            ) -> None:
                heads, real = _heads(model, batch, s, args[0])
                m.context += _products(heads * real)
                m.context_sum += (heads * real).sum((0, 1))
                m.positions += real.sum()

            stack.callback(module.get_submodule(query[0].path).register_forward_hook(see_queries).remove)
            stack.callback(module.get_submodule(key[0].path).register_forward_hook(see_keys).remove)
            stack.callback(consumer.register_forward_pre_hook(see_context).remove)
        yield


def _part(site: Site, made: tuple[Producer, int], output: Tensor) -> Tensor:
    """The features of one part of a producer's output, head by head."""
    rows = part_rows(site, *made, torch.arange(site.units))
    return output.index_select(-1, rows.to(output.device))


def _heads(model: OpenModel, batch: Batch, site: Site, features: Tensor) -> tuple[Tensor, Tensor]:
    """(examples or windows, positions, units, width) in float64, and 1 where that is no padding, shaped to match."""
    features = features.movedim(site.batch_axis, 0).flatten(1, -2).double()
    heads = features.unflatten(-1, (site.units, site.width))
    shape = heads.shape[:2]
    own = model.anatomy.stream_of(site.block).mask
    masks = [batch.real(own), *(batch.real(name) for name in batch.inputs if name.endswith("mask"))]
    real = next((mask for mask in masks if mask is not None and mask.shape == shape), None)
    if real is None:
        return heads, heads.new_ones(*shape, 1, 1)
    return heads, real.to(heads)[..., None, None]


def _products(heads: Tensor) -> Tensor:
    """Sums over positions: (units, width, width)."""
    return torch.einsum("bsuw,bsuv->uwv", heads, heads)
