"""Merging similar tokens as a model runs (ToMe: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023).

Tokens alternate between two sets; each token of the first set points to the token of the second whose key is most
like its own, and the tokens with the most similar pairs are merged into their partners. A merged token is the mean
of all the original positions in it: tokens have sizes, and attention weighs keys by them (proportional attention).

A schedule says how many: `counts[l]` tokens behind block l. Hooks do it; no forward is patched. ToMe merges between
attention and FFN; here tokens are merged on the block's output, by the keys of that block's attention, because a
block's residual can be reached there in every architecture. This costs the FFN of the block at its full length, and
nothing else. Behind the last block the tokens are spread back to their original positions, so that whatever reads
them (norm, pooling, decoder) finds as many as without merging, and averages by size.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from optin_cli.standalone.sizes import CHANGES


def most_merged(tokens: float, prefix: int) -> int:
    """Return how many of `tokens` can be merged at once: half of those behind the first `prefix`."""
    return max(0, int(tokens) - prefix) // 2


def match(keys: Tensor, count: int, protected: int = 0) -> Tensor:
    """Match `count` tokens with the ones most like them, and return where each token goes.

    `keys` is (batch, tokens, width); the first `protected` tokens (class token, registers) stay as they are. Returns
    (batch, tokens): the place of each among those that are left, which keep their order. `count` is capped by
    `most_merged`. Ties go to the earlier token, so the same keys always give the same answer.
    """
    batch, tokens, _ = keys.shape
    count = min(count, most_merged(tokens, protected))
    if not count:
        return torch.arange(tokens, device=keys.device).expand(batch, -1)
    unit = F.normalize(keys[:, protected:], dim=-1)
    similarity = unit[:, ::2] @ unit[:, 1::2].mT  # (batch, first set, second set)
    closest, partner = similarity.max(dim=-1)  # (batch, first set)
    chosen = closest.argsort(dim=-1, descending=True, stable=True)[:, :count]  # of the first set
    leaving = protected + 2 * chosen
    joining = protected + 2 * partner.gather(1, chosen) + 1
    stays = torch.ones(batch, tokens, dtype=torch.long, device=keys.device).scatter(1, leaving, 0)
    place = stays.cumsum(dim=1) - 1  # (batch, tokens): right for all that stay
    return place.scatter(1, leaving, place.gather(1, joining))


def merge(tokens: Tensor, sizes: Tensor, place: Tensor, left: int) -> tuple[Tensor, Tensor]:
    """Tokens (batch, tokens, d) that go to one place become their mean, weighted by `sizes` (batch, tokens).

    `place` is what `match` gives, `left` how many places there are. Returns the tokens that are left and their sizes.
    """
    batch = tokens.shape[0]  # `len` would fix it in an exported program
    merged_sizes = sizes.new_zeros(batch, left).scatter_add(1, place, sizes)
    index = place[..., None].expand_as(tokens)
    sums = tokens.new_zeros(batch, left, tokens.shape[-1]).scatter_add(
        1, index, tokens * sizes[..., None].to(tokens.dtype)
    )
    return sums / merged_sizes[..., None].to(tokens.dtype), merged_sizes


def spread(tokens: Tensor, source: Tensor) -> Tensor:
    """Give each original position the token it is in: `source` (batch, positions) -> (batch, positions, d)."""
    return tokens.gather(1, source[..., None].expand(-1, -1, tokens.shape[-1]))


def log_sizes(sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what proportional attention adds to the logits of the keys: (batch, 1, 1, tokens)."""
    return sizes.log().to(dtype)[:, None, None, :]


class Pass:
    """The tokens of a pass that runs."""

    keys: Tensor | None = None
    """(batch, tokens, width): of the block that runs, a mean over its heads; None if it has none."""
    sizes: Tensor | None = None
    """(batch, tokens): original positions in each token; None before the first merge."""
    source: Tensor | None = None
    """(batch, positions): the token that each original position is in."""


class Merging:
    """The schedule that a model runs with, and which tokens are where in the pass that runs."""

    def __init__(self, merges: Sequence[int], prefix: int) -> None:
        self.merges = list(merges)
        self.prefix = prefix
        self.active = True
        self._passes: dict[int, Pass] = {}  # by thread: replicas on several devices share their hooks
        self._handles: list[Any] = []

    @property
    def now(self) -> Pass:
        """The pass of this thread."""
        return self._passes.setdefault(threading.get_ident(), Pass())

    @property
    def sizes(self) -> Tensor | None:
        return self.now.sizes

    @property
    def source(self) -> Tensor | None:
        return self.now.source

    def remove(self) -> None:
        """Take the hooks out of the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Within the context, the model merges nothing."""
        before, self.active = self.active, False
        self.begin()
        try:
            yield
        finally:
            self.active = before

    def begin(self) -> None:
        """Forget the last pass."""
        self._passes.pop(threading.get_ident(), None)

    def step(self, hidden: Tensor, count: int) -> Tensor:
        """Merge `count` of the tokens `hidden` (batch, tokens, d)."""
        now, (batch, tokens, _) = self.now, hidden.shape
        count = min(count, most_merged(tokens, self.prefix))
        if not count:
            return hidden
        metric = hidden if now.keys is None else now.keys.to(hidden.device)  # no heads: compare the tokens
        place = match(metric.detach(), count, self.prefix)
        sizes = hidden.new_ones(batch, tokens, dtype=torch.float32) if now.sizes is None else now.sizes
        hidden, now.sizes = merge(hidden, sizes.to(hidden.device), place, tokens - count)
        now.source = place if now.source is None else place.gather(1, now.source.to(place.device))
        return hidden

    def spread(self, hidden: Tensor) -> Tensor:
        """Tokens of the pass that runs at their original positions: (batch, positions, d)."""
        source = self.now.source
        return hidden if source is None else spread(hidden, source.to(hidden.device))


def merge_tokens(
    model: Any, module: Any, counts: list[int], prefix: int, blocks: list[str], sites: list[dict[str, Any]]
) -> Merging:
    """Make `model` merge `counts` of its tokens behind its `blocks`, until `remove`. The first `prefix` stay.

    `module` finds what is at a path. A site has its `block`; `keys`, the layer that gives them: the `part`th of
    `parts`, of heads of `width`; the module of `attention`, and its argument `bias` to the logits. `kept`, if it has
    that: the heads whose keys are compared.
    """
    merging = Merging(counts, prefix)
    handles = merging._handles
    handles.append(module(blocks[0]).register_forward_pre_hook(_Begin(merging)))
    first = next(block for block, count in enumerate(counts) if count)
    for site in sites:
        if site["block"] < len(counts) and counts[site["block"]]:
            handles.append(module(site["keys"]).register_forward_hook(_Keys(merging, site)))
            merges = _Merge(merging, counts[site["block"]])
            handles.append(module(blocks[site["block"]]).register_forward_hook(merges))
        if site["block"] > first:
            bias = _Bias(merging, site["bias"])
            handles.append(module(site["attention"]).register_forward_pre_hook(bias, with_kwargs=True))
    handles.append(module(blocks[-1]).register_forward_hook(_Spread(merging)))
    return merging


def hidden_of(value: Any) -> Tensor:
    """The hidden states in a block's output: the tensor itself or the first element of a tuple."""
    return value if isinstance(value, Tensor) else value[0]


def output_with(value: Any, hidden: Tensor) -> Any:
    """A block's output with its hidden states replaced."""
    return hidden if isinstance(value, Tensor) else (hidden, *value[1:])


# Hooks are objects: those of a deep copy of the model share a copy of the Merging.


class _Begin:
    def __init__(self, merging: Merging) -> None:
        self.merging = merging

    def __call__(self, module: Any, args: Any) -> None:
        self.merging.begin()


class _Keys:
    def __init__(self, merging: Merging, site: dict[str, Any]) -> None:
        self.merging, self.site = merging, site

    def __call__(self, module: Any, args: Any, output: Tensor) -> None:
        self.merging.now.keys = None
        features = output.shape[-1] // self.site["parts"]
        if not self.merging.active or not features:
            return
        keys = output.detach().narrow(-1, self.site["part"] * features, features)
        keys = keys.unflatten(
            -1, (features // self.site["width"], self.site["width"])
        )  # (b, t, heads, width)
        if self.site.get("kept") is not None:
            keys = keys[:, :, self.site["kept"]]
        if keys.shape[2]:
            self.merging.now.keys = keys.mean(dim=2)


class _Merge:
    def __init__(self, merging: Merging, count: int) -> None:
        self.merging, self.count = merging, count

    def __call__(self, module: Any, args: Any, output: Any) -> Any:
        if not self.merging.active:
            return None
        return output_with(output, self.merging.step(hidden_of(output), self.count))


class _Bias:
    def __init__(self, merging: Merging, argument: str) -> None:
        self.merging, self.argument = merging, argument

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        sizes = self.merging.now.sizes
        if sizes is None or not self.merging.active:
            return None
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        hidden = hidden_of(next(iter(bound.arguments.values())))
        bias = log_sizes(sizes.to(hidden.device), hidden.dtype)
        given = bound.arguments.get(self.argument)
        # images have no padding: a mask for the tokens before the merges, which tracing makes, hides none
        if given is not None and given.shape[-1] == bias.shape[-1]:
            bias = given + bias
        bound.arguments[self.argument] = bias
        return bound.args, bound.kwargs


class _Spread:
    def __init__(self, merging: Merging) -> None:
        self.merging = merging

    def __call__(self, module: Any, args: Any, output: Any) -> Any:
        if not self.merging.active:
            return None
        return output_with(output, self.merging.spread(hidden_of(output)))


CHANGES["merging"] = merge_tokens
