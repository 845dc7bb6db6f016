"""Slice units out of the weights: select the producers' rows, the consumer's columns and what is between them.

The same function shrinks a trained model (`apply`) and a meta-device skeleton that is about to receive a
pruned checkpoint (`load`): only shapes and indices matter.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from optin_cli.structure.anatomy import CHANNELS, HEADS, Anatomy, Bypass, Producer, Site, UnitInput
from optin_cli.structure.hidden_states import hidden_argument
from optin_cli.structure.layers import select_carried, select_inputs, select_outputs, select_slices
from optin_cli.transforms.feature_info import update_feature_info
from optin_cli.transforms.unit_inputs import make_unit_input, select_unit_input


def slice_model(model: nn.Module, anatomy: Anatomy, keep: Mapping[str, Sequence[int]]) -> None:
    """Remove, in place, every unit that `keep` does not list. Sites that `keep` does not name stay whole.

    The anatomy describes the model before slicing; dissect it again afterwards.
    """
    for name, indices in keep.items():
        site = anatomy[name]
        if any(not 0 <= index < site.units for index in indices):
            raise ValueError(f"{name}: a kept index is not among the {site.units} units")
        if len(indices) < site.units:
            _slice_site(model, site, list(indices))
    if any(
        anatomy[name].kind == CHANNELS and len(indices) < anatomy[name].units
        for name, indices in keep.items()
    ):
        update_feature_info(model)


def _slice_site(model: nn.Module, site: Site, units: list[int]) -> None:
    chosen = torch.as_tensor(units, dtype=torch.long)
    features, made = features_of(chosen, site.width), features_of(chosen, site.rows)
    for producer in site.producers:
        select_outputs(model.get_submodule(producer.path), rows_of(site, producer, chosen))
    for path in site.carried:
        select_carried(model.get_submodule(path), made)
    for path in (*site.readers, site.consumer):
        select_inputs(model.get_submodule(path), features)
    sizes = {"units": len(units), "features": len(features)}
    for path, kind in site.counts.items():
        owner, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(owner), attribute, sizes[kind])
    for unit_input in site.unit_inputs:
        select_unit_input(model.get_submodule(unit_input.module), unit_input, units)
    for path, axis in site.tensors.items():
        owner, _, name = path.rpartition(".")
        module = model.get_submodule(owner)
        select_slices(module, name, axis, chosen if getattr(module, name).shape[axis] == site.units else made)
    if units:
        return
    if site.bypass:
        consumer = "" if site.bypass.empty else site.consumer.removeprefix(f"{site.bypass.module}.")
        inside = [given for given in site.unit_inputs if given.module == site.bypass.module]
        _bypass(model.get_submodule(site.bypass.module), consumer, site.bypass, inside)
    elif site.kind == HEADS:
        _attend_without_heads(model.get_submodule(_around(site)))


def rows_of(site: Site, producer: Producer, units: Tensor) -> Tensor:
    """Rows of a producer that belong to `units`."""
    width = site.rows_of(producer)
    if producer.by_unit:
        return features_of(units, producer.parts * width)
    # else part-major: part p of feature f is row p * features + f
    features = features_of(units, width)
    return torch.cat([features + part * site.units * width for part in range(producer.parts)])


def features_of(units: Tensor, width: int) -> Tensor:
    """Unit indices -> feature indices: unit u owns features u * width .. (u + 1) * width - 1."""
    return (units[:, None] * width + torch.arange(width)[None, :]).reshape(-1)


def _bypass(module: nn.Module, consumer: str, bypass: Bypass, unit_inputs: Sequence[UnitInput]) -> None:
    """Make `module` give no features, or what a `consumer` in it makes of them. A class, so that copies do it too."""
    signature = inspect.signature(module.forward)

    class Bypassed(type(module)):  # type: ignore[misc]
        _is_hf_initialized = True  # else transformers would, and may divide by a number of heads

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            hidden = hidden_argument(args, kwargs)
            given = signature.bind(*args, **kwargs).arguments
            cache, layer = given.get(bypass.cache), getattr(self, "layer_idx", 0)
            if bypass.attended and cache is not None:
                _count_attended(cache, given[bypass.attended], layer)
                cache = None
            past, keys = _count_in(cache, hidden, layer)
            for made in unit_inputs:
                if made.maker and given.get(made.argument) is None and getattr(self, made.needs):
                    make_unit_input(self, made, hidden, past, keys)
            output = hidden.new_zeros(*hidden.shape[:-1], 0)
            if consumer:
                output = self.get_submodule(consumer)(output)
            return (output, *[None] * (bypass.in_tuple - 1)) if bypass.in_tuple else output

    _become(module, Bypassed)


def _become(module: nn.Module, changed: type[nn.Module]) -> None:
    """Make `module` one of a subclass of its class that looks like the class from outside."""
    changed.forward.__signature__ = inspect.signature(type(module).forward)  # type: ignore[attr-defined]
    changed.__name__ = type(module).__name__
    changed.__module__ = type(module).__module__
    module.__class__ = changed


def _around(site: Site) -> str:
    """The innermost module that has the site's consumer and all its producers inside."""
    paths = [path.split(".")[:-1] for path in (site.consumer, *(one.path for one in site.producers))]
    shared = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
    return ".".join(names[0] for names in shared)


def _attend_without_heads(module: nn.Module) -> None:
    """Make `module` run where torch can't attend without heads: up to 2.11 at least its CPU kernel divides by zero,
    which ends the process."""

    class WithoutHeads(type(module)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            with _EmptyAttention():
                return super().forward(*args, **kwargs)

    _become(module, WithoutHeads)


class _EmptyAttention(TorchFunctionMode):
    """Within it, attention of no numbers is a product of no numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            query, key, value = _attended(*args, **kwargs)
            if not query.numel():
                return query @ key.transpose(-2, -1) @ value
        return func(*args, **kwargs)


def _attended(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query, key, value


def _count_attended(cache: Any, hidden: Tensor, layer: int) -> None:
    """Tell the cache of cross-attention, once, of the tokens that are attended to."""
    cache = getattr(cache, "cross_attention_cache", cache)
    if not int(cache.get_seq_length(layer)):
        nothing = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
        cache.update(nothing, nothing, layer)


def _count_in(cache: Any, hidden: Tensor, layer: int) -> tuple[Any, int]:
    """Tell a cache of `hidden`'s tokens; returns how many it had, and how many there are."""
    if cache is None:
        return 0, hidden.shape[1]
    cache = getattr(cache, "self_attention_cache", cache)
    past = cache.get_seq_length(layer)
    past = past.clone() if isinstance(past, Tensor) else past
    # one number a token: a cache takes no notice of tokens without any
    nothing = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
    keys, _ = cache.update(nothing, nothing, layer)
    return past, keys.shape[-2]
