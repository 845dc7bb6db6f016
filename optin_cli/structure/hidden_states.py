"""Hidden states: where they are in a block's arguments and output, and how they lie."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from optin_cli.standalone.merging import hidden_of, output_with
from optin_cli.structure.anatomy import NCHW, NHWC, SEQUENCE

HIDDEN = "hidden_states"

CACHES = ("past_key_values", "cache", "past_key_value", "layer_past")
"""Names of the argument with the cache of keys and values, over versions of transformers."""

__all__ = [
    "CACHES", "HIDDEN", "Arguments", "as_rows", "cache_argument", "hidden_argument", "hidden_of", "output_with",
    "with_hidden",
]  # fmt: skip

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def hidden_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states that a block is called with: its first argument, whatever its name."""
    return args[0] if args else kwargs[_name(kwargs)]


def with_hidden(arguments: Arguments, hidden: Any) -> Arguments:
    """A block's arguments with other hidden states."""
    args, kwargs = arguments
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, _name(kwargs): hidden})


def cache_argument(module: nn.Module, named: str = "") -> str:
    """The argument of `module` that takes a cache: the one that is `named`, or what another version calls it.

    Empty where it takes none. A table names the argument of one version; the model that runs may be of another.
    """
    takes = inspect.signature(module.forward).parameters
    return next((name for name in (named, *CACHES) if name in takes), "")


def _name(kwargs: dict[str, Any]) -> str:
    return HIDDEN if HIDDEN in kwargs else next(iter(kwargs))


def as_rows(hidden: Tensor, layout: str) -> Tensor:
    """Hidden states of any layout as (..., batch, positions, d); (batch, d) has one position."""
    if hidden.dim() == 2:
        return hidden[:, None]
    if layout == SEQUENCE:
        return hidden.transpose(-3, -2)
    if layout == NHWC:
        return hidden.flatten(-3, -2)
    return hidden.flatten(-2).mT if layout == NCHW else hidden
