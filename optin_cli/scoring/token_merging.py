"""Score the merging of tokens: one boundary at a time, a few counts each, measured like a unit's removal.

The trajectory is that of the blocks behind the boundary, with tokens spread back to their original positions: the same
sampled rows as for units, in the same relational loss, beside the same change of the output.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from optin_cli.artefacts.token_ranking import RankedTokens
from optin_cli.errors import InputError, param
from optin_cli.execution.hooks import block_outputs
from optin_cli.execution.macs import observed_tokens
from optin_cli.scoring.calibration import Calibration, Scores, gather_rows, mean_tokens
from optin_cli.scoring.losses import output_change, relational_change
from optin_cli.scoring.methods.base import Arrays, Item, item_scores
from optin_cli.structure.anatomy import Anatomy
from optin_cli.structure.merge_schedule import most_merged
from optin_cli.transforms.token_merging import install_merges

_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)
"""Of the most that can be merged at once. A schedule spreads its merges over blocks, so small counts matter most."""


def boundaries(anatomy: Anatomy) -> list[int]:
    """Blocks behind which tokens can be merged: all but the last."""
    return [site.block for site in anatomy.token_sites][:-1]


def boundary_name(block: int) -> str:
    return f"blocks.{block}.tokens"


def columns(block: int, depth: int) -> list[int]:
    """Return the blocks whose features measure what merging behind `block` changes: the deeper ones."""
    return list(range(block + 1, depth))


def levels(tokens: int, prefix: int) -> list[int]:
    """Counts that are measured: ascending, none of them 0."""
    most = most_merged(tokens, prefix)
    return sorted({max(1, round(share * most)) for share in _SHARES}) if most else []


def check_mergeable(anatomy: Anatomy, spec: str) -> None:
    """Raise `InputError` unless tokens of the model can be merged anywhere."""
    if not boundaries(anatomy):
        raise InputError(
            f"{param('tokens')}: {spec} of family {anatomy.family!r} has no tokens that can be merged",
            f"`optin families` lists the families whose tokens can be; score this one without {param('tokens')}",
        )


class TokenMerging:
    """One item for each batch and boundary, and the mean of what they find."""

    engine = "tokens"

    def __init__(self, calibration: Calibration) -> None:
        self.calibration = calibration
        anatomy = calibration.model.anatomy
        depth = len(anatomy.blocks)
        self.levels = levels(round(mean_tokens(calibration)), anatomy.prefix)
        self.columns = {block: columns(block, depth) for block in boundaries(anatomy)}
        count = len(self.levels)
        self.trajectory = {block: np.zeros((count, len(c))) for block, c in self.columns.items()}
        self.output = {block: np.zeros(count) for block in self.columns}
        self._recorded: tuple[int, TokenLosses] | None = None

    def items(self) -> list[Item]:
        return [
            Item(self.engine, batch, boundary_name(block), (block,), work=float(len(self.levels)))
            for batch in range(len(self.calibration))
            for block in self.columns
        ]

    def run(self, item: Item) -> Arrays:
        if self._recorded is None or self._recorded[0] != item.batch:
            self._recorded = item.batch, TokenLosses(self.calibration, item.batch)
        trajectory, output = self._recorded[1].score(*item.units)
        return item_scores({item.site: output}, {item.site: trajectory})

    def add(self, item: Item, arrays: Arrays) -> None:
        """Add the result of an item to the mean."""
        (block,), weight = item.units, self.calibration.weight(item.batch)
        self.trajectory[block] += weight * arrays[f"{item.site}/t"]
        self.output[block] += weight * arrays[f"{item.site}/o"]

    def sites(self) -> list[RankedTokens]:
        """Return the cost of merging tokens behind each block."""
        return [
            RankedTokens(block, list(self.levels), found, self.trajectory[block], self.output[block])
            for block, found in self.columns.items()
        ]


class TokenLosses:
    """Measures boundaries on one batch, from that batch's dense pass."""

    def __init__(self, calibration: Calibration, index: int) -> None:
        self.calibration = calibration
        self.model = calibration.model
        self.depth = len(self.model.anatomy.blocks)
        self.pieces = calibration.pieces(index)
        first = {key: value[:1] for key, value in self.pieces[0].inputs.items()}
        self.tokens = observed_tokens(self.model, first)
        lengths = {z: [self.tokens] * len(self.pieces) for z in range(self.depth)}
        self.rows = calibration.feature_rows(index, self.pieces, lengths)
        self.dense, self.outputs = self._run(0, 0)
        self.weights = [
            self.model.row_weights(piece.inputs, output)
            for piece, output in zip(self.pieces, self.outputs, strict=True)
        ]
        calibration.check_finite(self.dense, index)

    def score(self, block: int) -> Scores:
        """(trajectory [levels, deeper blocks], output [levels]) of merging behind `block`, one level at a time."""
        found = [self._measure(block, count) for count in levels(self.tokens, self.model.anatomy.prefix)]
        return np.array([one for one, _ in found]), np.array([two for _, two in found])

    def _measure(self, block: int, count: int) -> tuple[list[float], float]:
        features, outputs = self._run(block, count)
        trajectory = [
            float(relational_change(self.dense[z], features[z][None])) for z in columns(block, self.depth)
        ]
        task, temperature = self.model.task, self.calibration.temperature
        changes = [
            float(output_change(one, two[None], w, temperature=temperature, term=task.term))
            for one, two, w in zip(self.outputs, outputs, self.weights, strict=True)
        ]
        return trajectory, sum(changes) / sum(float(w.sum()) for w in self.weights)

    @torch.inference_mode()
    def _run(self, block: int, count: int) -> tuple[dict[int, Tensor], list[Tensor]]:
        """Sampled rows of the features behind `block` (of all for count 0), and each piece's output."""
        anatomy, last = self.model.anatomy, self.depth - 1
        merging = install_merges(self.model.module, anatomy, [0] * block + [count])
        rows: dict[int, list[Tensor]] = {z: [] for z in range(self.depth)}
        outputs = []
        try:
            for number, piece in enumerate(self.pieces):
                features: dict[int, Tensor] = {}
                with block_outputs(self.model, features, block + 1 if count else 0):
                    outputs.append(self.model.output(piece.inputs))
                for z, feature in features.items():
                    # behind the last block the model itself has spread the tokens
                    whole = feature if z == last else merging.spread(feature)
                    rows[z].append(gather_rows(whole, self.rows[z][number]))
        finally:
            merging.remove()
        return {z: torch.cat(parts, dim=-2) for z, parts in rows.items() if parts}, outputs
