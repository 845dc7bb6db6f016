"""Attention that lost its last head, and other modules that can't run without units."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from optin_cli.standalone.sizes import CHANGES, noted


@functools.cache
def _running(cls: Any, run: Any) -> Any:
    """A subclass that looks like `cls` from outside, and runs `run(module, forward of cls, ...)`."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return run(self, cls.forward, *args, **kwargs)

    forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    # transformers is not to draw weights for it: it may divide by a number of heads
    own = {"forward": forward, "__module__": cls.__module__, "_is_hf_initialized": True}
    return type(cls.__name__, (cls,), own)


def bypass(module: Any, **options: Any) -> None:
    """Make `module` give no features, or what the `consumer` in it makes of them, first in a tuple of `in_tuple`.

    `cache` names the argument with keys and values, which counts tokens; `attended` the one with what it attends to,
    if that is another sequence. `makes` lists (argument, maker, needs) of what it still makes for later blocks: where
    the argument is not given and it has what it `needs`, it calls its method `maker`.
    """
    noted(module, "bypass", **options)
    module.__class__ = _running(module.__class__, _bypassed)


def _bypassed(module: Any, forward: Any, *args: Any, **kwargs: Any) -> Any:
    how = next(change for change in module.optin_runs if change["how"] == "bypass")
    given = inspect.signature(forward).bind(module, *args, **kwargs).arguments
    hidden = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values())))
    cache, layer = given.get(how["cache"]), getattr(module, "layer_idx", 0)
    if how["attended"] and cache is not None:
        _count_attended(cache, given[how["attended"]], layer)
        cache = None
    past, keys = _count_in(cache, hidden, layer)
    for argument, maker, needs in how["makes"]:
        if given.get(argument) is None and getattr(module, needs):
            getattr(module, maker)(hidden.shape[1], keys, device=hidden.device, past_seen_tokens=past)
    output = hidden.new_zeros(*hidden.shape[:-1], 0)
    if how["consumer"]:
        output = module.get_submodule(how["consumer"])(output)
    return (output, *[None] * (how["in_tuple"] - 1)) if how["in_tuple"] else output


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


def attend_without_heads(module: Any) -> None:
    """Make `module` run where torch can't attend without heads: up to 2.11 at least its CPU kernel divides by zero,
    which ends the process."""
    noted(module, "without heads")
    module.__class__ = _running(module.__class__, _without_heads)


def _without_heads(module: Any, forward: Any, *args: Any, **kwargs: Any) -> Any:
    with _EmptyAttention():
        return forward(module, *args, **kwargs)


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


CHANGES |= {"bypass": bypass, "without heads": attend_without_heads}
