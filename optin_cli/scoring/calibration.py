"""The calibration that all engines share: batches, sampled rows and dense features."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from optin_cli.data.batches import Batch, Batches
from optin_cli.errors import InputError, param
from optin_cli.execution.macs import observed_tokens
from optin_cli.execution.memory import free_bytes, ran_out, whole_steps
from optin_cli.execution.peak_memory import activation_peak
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.scoring.losses import unit_rows
from optin_cli.structure.anatomy import ATTENTION_MASK, Site

log = logging.getLogger("optin")

Scores = tuple[np.ndarray, np.ndarray]
"""Scores of a site on one batch: (trajectory [units, columns], output [units])."""

# What a call costs before it computes anything, in tokens of work: below it, cutting padding off costs more.
_CALL_OVERHEAD = {"cpu": 32, "cuda": 1 << 13}


def measured_blocks(site: Site, depth: int) -> list[int]:
    """Return the blocks whose features make a site's trajectory: the deeper ones, or the last block itself."""
    return [block for block in range(min(site.block + 1, depth - 1), depth) if block not in site.passed]


def gather_rows(feature: Tensor, rows: Tensor) -> Tensor:
    """Unit rows of a feature (..., examples, tokens, d) at flat positions `rows`: (..., rows, d)."""
    flat = feature.flatten(-3, -2)  # (..., examples * tokens, d)
    return unit_rows(flat.index_select(-2, rows.to(flat.device)))  # blocks may be spread over devices


@dataclass
class Calibration:
    """The model, its batches and the choices that fix what a score means."""

    model: OpenModel
    batches: Batches
    rows: int
    """Tokens of a batch that enter the relations (OPTIN's K); fewer where a batch has fewer."""
    temperature: float
    seed: int
    memory: int | None = None
    """Bytes that activations may take; None for most of what is free."""
    graph_slots: int | None = field(default=None, init=False)
    """Token slots whose graph may be held at once; None until measured, halved when memory runs out."""
    _warned: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.model.module.training:
            raise InputError(
                f"{self.model.spec} is in training mode: dropout would be scored too",
                "call model.eval() first",
            )

    def __len__(self) -> int:
        return len(self.batches)

    def batch(self, index: int) -> Batch:
        return self.batches[index].to(self.model.device, self.model.dtype)

    def pieces(self, index: int, most: int | None = None) -> list[Batch]:
        """A batch in runs of examples of similar length, so that little padding is computed.

        At most `most` token slots in a run, or one example.
        """
        return self.batch(index).split(_CALL_OVERHEAD.get(self.model.device.type, 1 << 13), most)

    @cached_property
    def limit(self) -> int:
        """Bytes that activations may take."""
        return free_bytes(self.model.devices) if self.memory is None else self.memory

    @cached_property
    def longest(self) -> Batch:
        """The longest example alone: the last one, an image as good as any."""
        last = self.batch(len(self) - 1)
        return last.split(0, 1)[-1]

    def measure_graph(
        self, work: Callable[[Batch], object], spare: Callable[[], float] = lambda: 0.0
    ) -> None:
        """Find `graph_slots`: how many times the peak of `work` on the longest example fits beside `spare` bytes,
        which is asked afterwards."""
        if self.graph_slots is not None:
            return
        one = self.longest
        try:
            peak = activation_peak(lambda: work(one))
        except RuntimeError as error:
            if not ran_out(error):
                raise
            raise self._too_large(len(self) - 1) from error
        left = self.limit - spare()
        self.graph_slots = one.slots * whole_steps(left, peak)
        if peak > left:
            self.warn_tight("example", peak, left)

    def warn_tight(self, what: str, peak: float, left: float) -> None:
        """Say, once, that one `what` alone takes more bytes than are left for it."""
        if not self._warned:
            log.warning(
                "one %s alone takes %.1f MiB and %.1f MiB are left for it: going on with one at a time",
                what,
                peak / 2**20,
                max(0.0, left) / 2**20,
            )
        self._warned = True

    def halve_graph(self, index: int, error: BaseException) -> None:
        """Make `graph_slots` smaller after batch `index` ran out of memory; `InputError` if that can't be."""
        pieces = self.pieces(index, self.graph_slots)
        if all(len(piece) == 1 for piece in pieces):
            raise self._too_large(index) from error
        self.graph_slots = max(piece.slots for piece in pieces if len(piece) > 1) // 2
        log.info("out of memory: going on with %d token slots at a time", self.graph_slots)

    def _too_large(self, index: int) -> InputError:
        return InputError(
            f"calibration batch {index} does not fit in the memory of {self.model.device} even with one example at a "
            "time",
            f"use a smaller {param('max_length')}, or {param('device_map', 'auto')} to spread the model over "
            "several GPUs",
        )

    def weight(self, index: int) -> float:
        """Share of the examples that are in a batch."""
        return len(self.batches.ids(index)) / self.batches.count

    def sampled_rows(
        self, index: int, pieces: Sequence[Batch], tokens: Sequence[int], mask: str = ATTENTION_MASK
    ) -> list[Tensor]:
        """For each piece, flat (example * tokens + token) positions of the rows that enter the relations.

        Real tokens only, drawn by seed and batch: the same tokens however the batch is cut. `tokens` is the
        length of each piece's features, `mask` the input that marks their padding.
        """
        candidates = []
        for piece, length in zip(pieces, tokens, strict=True):
            valid = piece.real(mask)
            if valid is None:
                candidates.append(torch.arange(len(piece) * length))
            else:
                candidates.append(valid.cpu().flatten().nonzero()[:, 0])
        sizes = [len(c) for c in candidates]
        chosen = torch.ones(sum(sizes), dtype=torch.bool)
        if len(chosen) > self.rows:
            drawn = torch.randperm(len(chosen), generator=self.generator(index))[: self.rows]
            chosen = torch.zeros_like(chosen).index_fill_(0, drawn, True)
        return [
            positions[mask].to(self.model.device)
            for positions, mask in zip(candidates, chosen.split(sizes), strict=True)
        ]

    def feature_rows(
        self, index: int, pieces: Sequence[Batch], lengths: Mapping[int, Sequence[int]]
    ) -> dict[int, list[Tensor]]:
        """`sampled_rows` of every block's feature: the same ones wherever the features have the same `lengths`."""
        drawn: dict[tuple[str, Sequence[int]], list[Tensor]] = {}
        kinds = {z: (self.model.anatomy.stream_of(z).mask, tuple(lengths[z])) for z in lengths}
        for mask, tokens in dict.fromkeys(kinds.values()):
            drawn[mask, tokens] = self.sampled_rows(index, pieces, tokens, mask)
        return {z: drawn[kind] for z, kind in kinds.items()}

    def generator(self, batch: int, stream: int = 0) -> torch.Generator:
        """Return a separate CPU generator for each (seed, batch, stream), so that work can stop and resume anywhere."""
        mixed = (self.seed * 1_000_003 + batch) * 1_000_003 + stream
        return torch.Generator().manual_seed(mixed % (2**63))

    def check_finite(self, features: dict[int, Tensor], index: int) -> None:
        """Raise `InputError` naming the first block whose output is not finite."""
        for block, tensor in sorted(features.items()):
            if not torch.isfinite(tensor).all():
                raise InputError(
                    f"block {block} gives NaN or infinite values on calibration batch {index}",
                    f"try {param('dtype', 'float32')}, or check the checkpoint",
                )


def mean_tokens(calibration: Calibration) -> float:
    """Mean number of real tokens of an example; for images the length of the first block's output."""
    batch = calibration.batch(0)
    if batch.valid is not None:
        total = sum(int(b.valid.sum()) for b in calibration.batches if b.valid is not None)
        return total / calibration.batches.count
    return float(observed_tokens(calibration.model, {k: v[:1] for k, v in batch.inputs.items()}))
