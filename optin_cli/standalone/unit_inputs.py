"""Arguments with one slice a unit, made outside the block: a module sees the slices of the units it has left.

A position bias that the first block makes for all blocks (T5) is passed along whole, since every block has units of
its own left.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from optin_cli.standalone.sizes import CHANGES, noted


class InputHook:
    """A hook that knows one selection. A class, so that copies of a module have copies of it."""

    def __init__(self, run: Any, how: dict[str, Any]) -> None:
        self.run, self.how = run, how

    def __call__(self, *given: Any) -> Any:
        return self.run(self.how, *given)


def select_unit_input(module: Any, **options: Any) -> None:
    """Make `module` see only `units` of an `argument` along `axis`; a second pruning selects among the first one's.

    If the module passes it on it is element `returned` of the output, and `maker` is the method that makes it where
    it is not given.
    """
    for how in getattr(module, "optin_runs", ()):
        if how["how"] == "selects" and how["argument"] == options["argument"]:
            how["units"] = [how["units"][unit] for unit in options["units"]]
            return
    how = noted(module, "selects", **options)
    module.register_forward_pre_hook(InputHook(_select, how), with_kwargs=True)
    if how["returned"]:
        module.register_forward_hook(InputHook(_pass_on, how))
    if how["maker"] and hasattr(module, how["maker"]):
        _select_made(module, how["maker"])


def _select_made(module: Any, maker: str) -> None:
    """Select from what the method `maker` gives. A class, so that copies of the module do it too."""

    def made(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        how = next(how for how in self.optin_runs if how.get("maker") == maker)
        whole = getattr(super(cls, self), maker)(*args, **kwargs)
        if how["returned"]:
            self.optin_whole = {**self.optin_whole, how["argument"]: whole}
        return _slices(whole, how)

    base = type(module)
    cls = type(base.__name__, (base,), {maker: made, "__module__": base.__module__})
    module.__class__ = cls


def _select(how: Any, module: Any, args: Any, kwargs: Any) -> Any:
    """Select from the argument. What is passed on is kept whole, on the module: its replicas each have their own."""
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    whole = bound.arguments.get(how["argument"])
    if how["returned"]:
        module.optin_whole = {**getattr(module, "optin_whole", {}), how["argument"]: whole}
    if whole is not None:
        bound.arguments[how["argument"]] = _slices(whole, how)
    return bound.args, bound.kwargs


def _slices(whole: Tensor, how: Any) -> Tensor:
    """The slices of the units that are left. A tensor without the axis, or with one slice there, is all units'."""
    axis = how["axis"]
    if not -whole.dim() <= axis < whole.dim() or whole.shape[axis] == 1:
        return whole
    return whole.index_select(axis, torch.as_tensor(how["units"], dtype=torch.long, device=whole.device))


def _pass_on(how: Any, module: Any, _: Any, output: Any) -> Any:
    """Give the next block what this one was given, not what is left of it."""
    place, whole = how["returned"], module.optin_whole[how["argument"]]
    module.optin_whole = {**module.optin_whole, how["argument"]: None}
    if whole is None and output[place] is not None:
        whole = output[place].narrow(how["axis"], 0, 1)  # made for the units that are left: the same for all
    return (*output[:place], whole, *output[place + 1 :])


CHANGES["selects"] = select_unit_input
