"""Depth: whole blocks, by how little they turn what they read (ShortGPT: Men et al. 2024, block influence).

BI_l = 1 - E[x^T y / (||x|| ||y||)], with x a token's hidden state before block l and y the one behind it: one less the
cosine of their angle, a mean over the real tokens of each batch. A block's units share its influence by their MACs, and
stay or go together.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optin_cli.artefacts.ranking import RankedSite
from optin_cli.errors import InputError, param
from optin_cli.execution.hooks import on_blocks
from optin_cli.scoring.calibration import mean_tokens
from optin_cli.scoring.methods.base import Arrays, Item, OnWork, ScoringMethod, item_scores
from optin_cli.structure.anatomy import HEADS, NEURONS
from optin_cli.structure.hidden_states import as_rows, hidden_argument, hidden_of


class DepthMethod(ScoringMethod):
    """ShortGPT: the output part of a unit is the influence of its block."""

    name = "depth"
    kinds = frozenset({HEADS, NEURONS})
    whole_blocks = True

    def run(self, item: Item, on_work: OnWork) -> Arrays:
        influence = dict.fromkeys(self.anatomy.blocks, 0.0)  # blocks that share a module go together
        for path, found in zip(self.anatomy.blocks, self._influence(item.batch), strict=True):
            influence[path] += found
        return item_scores(
            {s.name: np.full(s.units, influence[self.anatomy.blocks[s.block]]) for s in self.anatomy}
        )

    def combine(self, sites: list[RankedSite]) -> dict[str, np.ndarray]:
        tokens = mean_tokens(self.calibration)
        macs = np.zeros(len(self.anatomy.blocks))
        for site in sites:
            macs[site.block] += site.units * site.macs_per_unit(tokens)
        return {
            site.name: site.output * site.macs_per_unit(tokens) / max(macs[site.block], 1e-300)
            for site in sites
        }

    def _influence(self, index: int) -> np.ndarray:
        """[blocks]"""
        blocks = self.anatomy.blocks
        cosines, tokens = np.zeros(len(blocks)), np.zeros(len(blocks))
        for piece in self.calibration.pieces(index):
            given: dict[int, Tensor] = {}

            def enter(
                z: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], given: Any = given
            ) -> None:
                given[z] = self._rows(hidden_argument(args, kwargs), z)

            def leave(
                z: int, _: nn.Module, __: Any, ___: Any, output: Any, given: Any = given, piece: Any = piece
            ) -> None:
                before, after = given.pop(z), self._rows(hidden_of(output), z)
                if before.shape != after.shape:
                    raise InputError(
                        f"block {z} of {self.model.spec} gives {tuple(after.shape)} for {tuple(before.shape)}: "
                        f"there is no angle between them for {param('method', self.name)}",
                        f"use {param('method', meta='curvature')}",
                    )
                found = F.cosine_similarity(before, after, dim=-1)  # (examples, tokens)
                real = piece.real(self.anatomy.stream_of(z).mask)
                found = found.flatten() if real is None else found[real]
                cosines[z] += float(found.double().sum())
                tokens[z] += len(found)

            with (
                torch.inference_mode(),
                on_blocks(self.model.module, blocks, enter, before=True),
                on_blocks(self.model.module, blocks, leave),
            ):
                self.model.output(piece.inputs)
        return 1 - cosines / np.maximum(tokens, 1)

    def _rows(self, hidden: Tensor, block: int) -> Tensor:
        """(examples, tokens, d)"""
        return as_rows(hidden, self.anatomy.stream_of(block).layout).float()
