"""Choose the rows of a batch that enter a site's equations, and their weights."""

from __future__ import annotations

import torch
from torch import Tensor

from optin_cli.artefacts.files import digest_json
from optin_cli.compensation.settings import Compensation
from optin_cli.data.batches import Batch, Batches
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.structure.anatomy import NCHW, NHWC

_POSITIONS = 64
"""Of a map, at most so many positions of each example are fitted: neighbours are alike."""


class RowChoice:
    """The rows of all batches: real tokens or positions, weighed, some of them held out."""

    def __init__(self, model: OpenModel, batches: Batches, settings: Compensation) -> None:
        self.batches = batches
        self.settings = settings
        self.anatomy = model.anatomy
        self.valid: list[dict[str, Tensor | None]] = []
        """Of each batch, by the name of the mask: [examples, tokens], True where a token is not padding."""
        self.read: list[int] | None = None
        """Tokens that the head reads; None where it reads all."""

    def add(self, batch: Batch) -> None:
        """The padding of the next batch."""
        self.valid.append({s.mask: batch.real(s.mask) for s in self.anatomy.streams})

    def drawn(self, rows: Tensor, name: str, index: int) -> Tensor:
        """Of rows [examples, positions, d] of a map, the same few positions of each example for a site and batch."""
        examples, positions = rows.shape[:2]
        maps = self.anatomy.stream_of(self.anatomy[name].block).layout in (NHWC, NCHW)
        if not maps or positions <= _POSITIONS:
            return rows
        seed = int(digest_json([self.settings.seed, name, index])[:8], 16)
        order = torch.rand(examples, positions, generator=torch.Generator().manual_seed(seed)).argsort(1)
        return rows.gather(1, order[:, :_POSITIONS, None].expand(-1, -1, rows.shape[2]).to(rows.device))

    def weights(self, block: int, index: int, like: Tensor, in_order: bool) -> Tensor:
        """One for a real token; in the last block the tokens that the head reads share `read_share` of an example."""
        valid = self.valid[index][self.anatomy.stream_of(block).mask]
        weight = torch.ones_like(like) if valid is None else valid.to(like)
        if self.read is None or block + 1 < len(self.anatomy.blocks) or not in_order:
            return weight
        read = torch.zeros_like(weight)
        read[:, self.read] = weight[:, self.read]
        rest = weight - read
        share = self.settings.read_share
        tokens = weight.sum(1, keepdim=True)
        # (examples, 1): an example keeps the sum of its weights
        read_weight = share * tokens / read.sum(1, keepdim=True).clamp(min=1)
        rest_weight = (1 - share) * tokens / rest.sum(1, keepdim=True).clamp(min=1)
        return read * read_weight + rest * rest_weight

    def held_out(self, index: int, like: Tensor) -> Tensor:
        """True for all tokens of every `held_out`-th row, [examples, tokens]; examples of one row go together."""
        rows = (self.batches.rows[i] for i in self.batches.ids(index))
        held = torch.tensor([self.settings.holds_out(row) for row in rows], device=like.device)
        return held[:, None].expand(like.shape)
