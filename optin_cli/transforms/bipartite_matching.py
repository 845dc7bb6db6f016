"""Merging similar tokens, as pure functions (ToMe: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023).

Tokens alternate between two sets; each token of the first set points to the token of the second whose key is most
like its own, and the tokens with the most similar pairs are merged into their partners. A merged token is the mean
of all the original positions in it: tokens have sizes, and attention weighs keys by them (proportional attention).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from optin_cli.structure.merge_schedule import most_merged


def match(keys: Tensor, count: int, protected: int = 0) -> Tensor:
    """Where each token goes when `count` tokens are merged into the ones most like them.

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
    """What proportional attention adds to the logits of the keys: (batch, 1, 1, tokens)."""
    return sizes.log().to(dtype)[:, None, None, :]
