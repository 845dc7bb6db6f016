"""Arguments with one slice a unit, made outside the block: a sliced module sees the slices of the units it has left.

A position bias that the first block makes for all blocks (T5) is passed along whole, since every block has units of
its own left.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from optin_cli.structure.anatomy import UnitInput


class _Selector:
    """Forward pre-hook that keeps the surviving units' slices of one argument, and remembers it whole."""

    def __init__(self, unit_input: UnitInput, units: list[int]) -> None:
        self.unit_input = unit_input
        self.units = units
        self.whole: Tensor | None = None
        """The value that the last call was given, or made itself."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        self.whole = bound.arguments.get(self.unit_input.argument)
        if self.whole is not None:
            bound.arguments[self.unit_input.argument] = self.of(self.whole)
        return bound.args, bound.kwargs

    def of(self, whole: Tensor) -> Tensor:
        """The slices of the units that are left; a tensor that all units share stays as it is."""
        if not _has_slices(whole, self.unit_input.axis):
            return whole
        index = torch.as_tensor(self.units, dtype=torch.long, device=whole.device)
        return whole.index_select(self.unit_input.axis, index)

    def make(self, whole: Tensor) -> Tensor:
        """The value that the module made itself, for all units."""
        self.whole = whole
        return self.of(whole)


class _PassOn:
    """Forward hook that gives the next block what this one was given, not what is left of it."""

    def __init__(self, selector: _Selector) -> None:
        self.selector = selector

    def __call__(self, _: nn.Module, __: tuple[Any, ...], output: tuple[Any, ...]) -> tuple[Any, ...]:
        place, axis, whole = (
            self.selector.unit_input.returned,
            self.selector.unit_input.axis,
            self.selector.whole,
        )
        self.selector.whole = None
        if whole is None and output[place] is not None:
            whole = output[place].narrow(axis, 0, 1)  # made for the units that are left: the same for all
        return (*output[:place], whole, *output[place + 1 :])


def _has_slices(value: Tensor, axis: int) -> bool:
    """False for a tensor that all units share: without the axis, or with one slice that is broadcast along it."""
    return -value.dim() <= axis < value.dim() and value.shape[axis] != 1


def select_unit_input(module: nn.Module, unit_input: UnitInput, units: list[int]) -> None:
    """Make `module` see only `units` of an argument; a second pruning selects among the first one's."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, _Selector) and hook.unit_input.argument == unit_input.argument:
            hook.units = [hook.units[unit] for unit in units]
            return
    selector = _Selector(unit_input, units)
    module.register_forward_pre_hook(selector, with_kwargs=True)
    if unit_input.returned:
        module.register_forward_hook(_PassOn(selector))
    if unit_input.maker and hasattr(module, unit_input.maker):
        _select_made(module, unit_input.maker)


def _select_made(module: nn.Module, maker: str) -> None:
    """Select from what the method `maker` gives. A class, so that copies of the module do it too."""

    def made(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        hooks = self._forward_pre_hooks.values()
        selector = next(h for h in hooks if isinstance(h, _Selector) and h.unit_input.maker == maker)
        return selector.make(getattr(super(cls, self), maker)(*args, **kwargs))

    base = type(module)
    cls = type(base.__name__, (base,), {maker: made, "__module__": base.__module__})
    module.__class__ = cls


def make_unit_input(module: Any, unit_input: UnitInput, queries: Tensor, past: Any, keys: int) -> None:
    """Let a module that does not run any more make what later blocks are to be given.

    `queries`: its hidden states (batch, tokens, d), of which `past` are in the cache; `keys` of them are attended to.
    """
    getattr(module, unit_input.maker)(queries.shape[1], keys, device=queries.device, past_seen_tokens=past)
