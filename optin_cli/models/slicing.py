"""Slice units out of the weights: select the producers' rows, the consumer's columns and what stands between them.

The same function shrinks a trained model (`apply`) and a meta-device skeleton that is about to receive a
pruned checkpoint (`load`): only shapes and indices matter.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from optin_cli.models.anatomy import Anatomy, Bypass, Producer, Site, UnitInput
from optin_cli.models.hidden import hidden_argument
from optin_cli.models.layers import select_carried, select_inputs, select_outputs, select_slices


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
    for path, kind in site.counts:
        owner, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(owner), attribute, sizes[kind])
    for unit_input in site.unit_inputs:
        select_unit_input(model.get_submodule(unit_input.module), unit_input, units)
    for path, axis in site.tensors:
        owner, _, name = path.rpartition(".")
        select_slices(model.get_submodule(owner), name, axis, chosen)
    if site.bypass and not units:
        consumer = site.consumer.removeprefix(f"{site.bypass.module}.")
        _bypass(model.get_submodule(site.bypass.module), consumer, site.bypass)


def rows_of(site: Site, producer: Producer, units: Tensor) -> Tensor:
    """Rows of a producer that belong to `units`."""
    width = site.rows_of(producer)
    if producer.by_unit:
        return features_of(units, producer.parts * width)
    # else part-major: part p of feature f stands in row p * features + f
    features = features_of(units, width)
    return torch.cat([features + part * site.units * width for part in range(producer.parts)])


def features_of(units: Tensor, width: int) -> Tensor:
    """Unit indices -> feature indices: unit u owns features u * width .. (u + 1) * width - 1."""
    return (units[:, None] * width + torch.arange(width)[None, :]).reshape(-1)


def _bypass(module: nn.Module, consumer: str, bypass: Bypass) -> None:
    """Make `module` give what its `consumer` makes of no features. A class, so that copies of the module do it too."""
    signature = inspect.signature(module.forward)

    class Bypassed(type(module)):  # type: ignore[misc]
        _is_hf_initialized = True  # else transformers would, and may divide by a number of heads

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            hidden = hidden_argument(args, kwargs)
            output = self.get_submodule(consumer)(hidden.new_zeros(*hidden.shape[:-1], 0))
            if bypass.cache:
                cache = signature.bind(*args, **kwargs).arguments.get(bypass.cache)
                if cache is not None:  # one number a token: a cache takes no notice of tokens without any
                    nothing = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
                    cache.update(nothing, nothing, self.layer_idx)
            return (output, *[None] * (bypass.in_tuple - 1)) if bypass.in_tuple else output

    Bypassed.__name__ = type(module).__name__
    Bypassed.__module__ = type(module).__module__
    module.__class__ = Bypassed


class _UnitInputSelector:
    """Forward pre-hook that keeps the surviving units' slices of one argument."""

    def __init__(self, unit_input: UnitInput, units: list[int]) -> None:
        self.unit_input = unit_input
        self.units = units

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        value = bound.arguments.get(self.unit_input.argument)
        if value is not None and _has_slices(value, self.unit_input.axis):
            index = torch.as_tensor(self.units, dtype=torch.long, device=value.device)
            bound.arguments[self.unit_input.argument] = value.index_select(self.unit_input.axis, index)
        return bound.args, bound.kwargs


def _has_slices(value: Tensor, axis: int) -> bool:
    """False for a tensor that all units share: without the axis, or with one slice that is broadcast along it."""
    return -value.dim() <= axis < value.dim() and value.shape[axis] != 1


def select_unit_input(module: nn.Module, unit_input: UnitInput, units: list[int]) -> None:
    """Make `module` see only `units` of an argument; a second pruning selects among the first one's."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, _UnitInputSelector) and hook.unit_input.argument == unit_input.argument:
            hook.units = [hook.units[unit] for unit in units]
            return
    module.register_forward_pre_hook(_UnitInputSelector(unit_input, units), with_kwargs=True)
