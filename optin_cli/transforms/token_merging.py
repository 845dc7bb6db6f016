"""Merging similar tokens as a model runs (ToMe: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023).

Tokens alternate between two sets; each token of the first set points to the token of the second whose key is most
like its own, and the tokens with the most similar pairs are merged into their partners. A merged token is the mean
of all the original positions in it: tokens have sizes, and attention weighs keys by them (proportional attention).

A schedule says how many: `merges[l]` tokens behind block l. Hooks do it; no forward is patched. ToMe merges between
attention and FFN; here tokens are merged on the block's output, by the keys of that block's attention, because a
block's residual can be reached there in every architecture. This costs the FFN of the block at its full length, and
nothing else. Behind the last block the tokens are spread back to their original positions, so that whatever reads
them (norm, pooling, decoder) finds as many as without merging, and averages by size.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from optin_cli.architectures.token_sites import check_merges
from optin_cli.structure.anatomy import Anatomy, TokenSite
from optin_cli.structure.hidden_states import hidden_of, output_with
from optin_cli.structure.merge_schedule import most_merged


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
    merged_sizes = sizes.new_zeros(len(sizes), left).scatter_add(1, place, sizes)
    index = place[..., None].expand_as(tokens)
    sums = tokens.new_zeros(len(tokens), left, tokens.shape[-1]).scatter_add(
        1, index, tokens * sizes[..., None].to(tokens.dtype)
    )
    return sums / merged_sizes[..., None].to(tokens.dtype), merged_sizes


def spread(tokens: Tensor, source: Tensor) -> Tensor:
    """Give each original position the token it is in: `source` (batch, positions) -> (batch, positions, d)."""
    return tokens.gather(1, source[..., None].expand(-1, -1, tokens.shape[-1]))


def log_sizes(sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what proportional attention adds to the logits of the keys: (batch, 1, 1, tokens)."""
    return sizes.log().to(dtype)[:, None, None, :]


class Merging:
    """The schedule that a model runs with, and which tokens are where in the pass that runs."""

    def __init__(self, merges: Sequence[int], prefix: int) -> None:
        self.merges = list(merges)
        self.prefix = prefix
        self.active = True
        self.keys: Tensor | None = None
        """(batch, tokens, width): of the block that runs, a mean over its heads; None if it has none."""
        self.sizes: Tensor | None = None
        """(batch, tokens): original positions in each token; None before the first merge."""
        self.source: Tensor | None = None
        """(batch, positions): the token that each original position is in."""
        self._handles: list[RemovableHandle] = []

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
        self.keys = self.sizes = self.source = None

    def step(self, hidden: Tensor, count: int) -> Tensor:
        """Merge `count` of the tokens `hidden` (batch, tokens, d)."""
        batch, tokens, _ = hidden.shape
        count = min(count, most_merged(tokens, self.prefix))
        if not count:
            return hidden
        metric = hidden if self.keys is None else self.keys.to(hidden.device)  # no heads: compare the tokens
        place = match(metric.detach(), count, self.prefix)
        sizes = hidden.new_ones(batch, tokens, dtype=torch.float32) if self.sizes is None else self.sizes
        hidden, self.sizes = merge(hidden, sizes.to(hidden.device), place, tokens - count)
        self.source = place if self.source is None else place.gather(1, self.source.to(place.device))
        return hidden

    def spread(self, hidden: Tensor) -> Tensor:
        """Tokens of the pass that runs at their original positions: (batch, positions, d)."""
        return hidden if self.source is None else spread(hidden, self.source.to(hidden.device))


def install_merges(
    model: nn.Module,
    anatomy: Anatomy,
    merges: Sequence[int],
    keep: Mapping[str, Sequence[int]] | None = None,
    what: str = "the schedule",
) -> Merging:
    """Make `model` merge tokens by a schedule, until `remove`.

    With `keep`, site name -> units, only the keys of the kept heads are compared: a masked model then merges what the
    sliced one will. Raises `ArtefactError` for a schedule that does not fit the model; `what` names it.
    """
    check_merges(anatomy, merges, what)
    merging = Merging(merges, anatomy.prefix)
    blocks = [model.get_submodule(path) for path in anatomy.blocks]
    if not any(merges):
        return merging
    handles = merging._handles
    handles.append(blocks[0].register_forward_pre_hook(_Begin(merging)))
    first = next(block for block, count in enumerate(merges) if count)
    for site in anatomy.token_sites:
        if site.block < len(merges) and merges[site.block]:
            producer = model.get_submodule(site.keys.path)
            handles.append(producer.register_forward_hook(_Keys(merging, anatomy, site, keep)))
            handles.append(blocks[site.block].register_forward_hook(_Merge(merging, merges[site.block])))
        if site.block > first:
            attention = model.get_submodule(site.attention)
            handles.append(attention.register_forward_pre_hook(_Bias(merging, site.bias), with_kwargs=True))
    handles.append(blocks[-1].register_forward_hook(_Spread(merging)))
    return merging


# Hooks are objects: those of a deep copy of the model share a copy of the Merging.


class _Begin:
    def __init__(self, merging: Merging) -> None:
        self.merging = merging

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.merging.begin()


class _Keys:
    def __init__(
        self, merging: Merging, anatomy: Anatomy, site: TokenSite, keep: Mapping[str, Sequence[int]] | None
    ) -> None:
        self.merging = merging
        self.part, self.parts = site.part, site.keys.parts
        self.width = anatomy[site.heads].width
        self.kept = None if keep is None else list(keep[site.heads])

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.merging.keys = None
        features = output.shape[-1] // self.parts
        if not self.merging.active or not features:
            return
        keys = output.detach().narrow(-1, self.part * features, features)
        keys = keys.unflatten(-1, (features // self.width, self.width))  # (batch, tokens, heads, width)
        if self.kept is not None:
            keys = keys[:, :, self.kept]
        if keys.shape[2]:
            self.merging.keys = keys.mean(dim=2)


class _Merge:
    def __init__(self, merging: Merging, count: int) -> None:
        self.merging = merging
        self.count = count

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self.merging.active:
            return None
        return output_with(output, self.merging.step(hidden_of(output), self.count))


class _Bias:
    def __init__(self, merging: Merging, argument: str) -> None:
        self.merging = merging
        self.argument = argument

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.merging.sizes is None or not self.merging.active:
            return None
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        hidden = hidden_of(next(iter(bound.arguments.values())))
        bias = log_sizes(self.merging.sizes.to(hidden.device), hidden.dtype)
        given = bound.arguments.get(self.argument)
        bound.arguments[self.argument] = bias if given is None else given + bias
        return bound.args, bound.kwargs


class _Spread:
    def __init__(self, merging: Merging) -> None:
        self.merging = merging

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self.merging.active:
            return None
        return output_with(output, self.merging.spread(hidden_of(output)))
