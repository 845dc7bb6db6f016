"""Ablation: remove each unit in turn and measure (docs/method.md, section 3).

Exact, and far cheaper than one forward for each unit.

`Replay` runs only what a missing unit changes; many variants share a call, as many as fit; examples of similar
length run together, so that hardly any padding is computed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from optin_cli.errors import InputError, param
from optin_cli.execution.memory import ran_out, whole_steps
from optin_cli.execution.peak_memory import LiveStorages, activation_peak
from optin_cli.execution.replay import Replay
from optin_cli.scoring.calibration import Calibration, Scores, gather_rows, measured_blocks
from optin_cli.scoring.losses import output_change, relational_change
from optin_cli.scoring.methods.base import Arrays, Item, OnWork, item_scores
from optin_cli.scoring.methods.trajectory import TrajectoryMethod
from optin_cli.scoring.settings import ScoreSettings
from optin_cli.structure.anatomy import Site

log = logging.getLogger("optin")

_ONE = " even with one unit removed at a time"
_UNITS_PER_ITEM = 192  # some seconds of ablation: lost at a kill, handed to one process of many

# Tokens of all variants in one call. Beyond this a CPU gains nothing and a GPU is full.
_TOKENS_PER_CALL = {"cpu": 4096, "cuda": 1 << 17}


class AblationMethod(TrajectoryMethod):
    """Removes every unit in turn."""

    name = "ablation"
    takes_sublayers = True

    def __init__(
        self, calibration: Calibration, settings: ScoreSettings, labels: list[Any] | None = None
    ) -> None:
        super().__init__(calibration, settings, labels)
        self._recorded: tuple[int, Ablation] | None = None

    def items(self) -> list[Item]:
        batches = range(len(self.calibration))
        return [item for batch in batches for site in self.anatomy for item in self.items_of(batch, site)]

    def items_of(self, batch: int, site: Site, units: np.ndarray | None = None) -> list[Item]:
        """Some units of a site, or all of them, on one batch."""
        return unit_items(self.name, batch, site, len(self.anatomy.blocks), units)

    def run(self, item: Item, on_work: OnWork) -> Arrays:
        if self._recorded is None or self._recorded[0] != item.batch:
            reduced = self.settings.precision == "reduced"
            self._recorded = item.batch, Ablation(self.calibration, item.batch, reduced)
        return run_units(self._recorded[1], self.anatomy[item.site], item, on_work)

    def release(self) -> None:
        self._recorded = None


class UnitEngine(Protocol):
    """Scores single units of a site on one batch."""

    def score(self, site: Site, units: np.ndarray, on_units: Callable[[int], None]) -> Scores: ...


def unit_items(
    engine: str, batch: int, site: Site, depth: int, units: np.ndarray | None = None
) -> list[Item]:
    """Units of a site of a model of `depth` blocks, cut into items."""
    units = np.arange(site.units) if units is None else units
    each = (depth - site.block) / depth / 2  # only the deeper blocks run, on hardly any padding
    parts = [units[start : start + _UNITS_PER_ITEM] for start in range(0, len(units), _UNITS_PER_ITEM)]
    return [Item(engine, batch, site.name, tuple(part.tolist()), work=each * len(part)) for part in parts]


def run_units(engine: UnitEngine, site: Site, item: Item, on_work: OnWork) -> Arrays:
    """The scores of an item's units."""
    each = item.work / len(item.units)
    trajectory, output = engine.score(site, np.array(item.units), lambda n: on_work(n * each))
    return item_scores({site.name: output}, {site.name: trajectory})


class Ablation:
    """Scores units on one batch, from that batch's recorded dense pass."""

    def __init__(self, calibration: Calibration, index: int, reduced: bool = False) -> None:
        self.calibration = calibration
        self.model = calibration.model
        self.index = index
        with self._must_fit(""), LiveStorages() as recorded:
            self.replays = [Replay(self.model, piece, reduced) for piece in calibration.pieces(index)]
        self.left = calibration.limit - recorded.live
        """Bytes for variants."""
        for replay in self.replays:
            calibration.check_finite(replay.features, index)
        pieces = [replay.piece for replay in self.replays]
        lengths = {z: [r.features[z].shape[1] for r in self.replays] for z in range(self.depth)}
        self.rows = calibration.feature_rows(index, pieces, lengths)
        self.dense = {z: self._features([r.features for r in self.replays], z) for z in range(self.depth)}
        self.weights = [self.model.row_weights(replay.piece.inputs, replay.output) for replay in self.replays]
        self.tokens = sum(len(p) * t for p, t in zip(pieces, lengths[0], strict=True))
        self._broadcasting: dict[str, bool] = {}

    @property
    def depth(self) -> int:
        return len(self.model.anatomy.blocks)

    @cached_property
    def step(self) -> int:
        """Variants in one call: found out where there are several."""
        return self._fitting()

    @torch.inference_mode()
    def score(
        self, site: Site, units: np.ndarray, on_units: Callable[[int], None] = lambda _: None
    ) -> Scores:
        """(trajectory [units, columns], output [units]) of `units` of a site; `on_units` hears how many a call did.

        Raises `InputError` when not even one variant fits in memory.
        """
        with self._must_fit(_ONE):
            broadcast = self._broadcasts(site)
        trajectory = np.zeros((len(units), len(measured_blocks(site, self.depth))))
        output = np.zeros(len(units))
        start = 0
        while start < len(units):
            step = self.step if len(units) > 1 else 1
            chosen = torch.as_tensor(units[start : start + step], device=self.model.device)
            try:
                one, two = self._measure(site, chosen, broadcast)
            except RuntimeError as error:
                if not ran_out(error):
                    raise
                self._shrink(step, error)
                continue
            trajectory[start : start + len(chosen)] = one
            output[start : start + len(chosen)] = two
            start += len(chosen)
            on_units(len(chosen))
        return trajectory, output

    def _broadcasts(self, site: Site) -> bool:
        """`Replay.broadcasts` of every piece, tried once for a site. A single variant shares nothing."""
        if site.units == 1:
            return False
        if site.name not in self._broadcasting:
            self._broadcasting[site.name] = all(replay.broadcasts(site) for replay in self.replays)
        return self._broadcasting[site.name]

    def _measure(self, site: Site, units: Tensor, broadcast: bool) -> Scores:
        measured = measured_blocks(site, self.depth)
        sampled: dict[int, list[Tensor]] = {z: [] for z in measured}
        changes = []
        for number, (replay, weights) in enumerate(zip(self.replays, self.weights, strict=True)):
            found, output = replay.run(site, units, broadcast)
            for z in measured:  # rows alone are kept: one piece's features are held at a time
                sampled[z].append(gather_rows(found[z], self.rows[z][number]))
            changes.append(
                output_change(
                    replay.output,
                    output,
                    weights,
                    temperature=self.calibration.temperature,
                    term=self.model.task.term,
                )
            )
        columns = [relational_change(self.dense[z], torch.cat(sampled[z], dim=-2)) for z in measured]
        change = torch.stack(changes).sum(0) / sum(float(w.sum()) for w in self.weights)
        return torch.stack(columns, dim=1).double().cpu().numpy(), change.double().cpu().numpy()

    def _features(self, found: list[dict[int, Tensor]], z: int) -> Tensor:
        """The sampled rows of block z's feature over all pieces, (..., K, d)."""
        parts = [gather_rows(features[z], rows) for features, rows in zip(found, self.rows[z], strict=True)]
        return torch.cat(parts, dim=-2)

    @torch.inference_mode()
    def _fitting(self) -> int:
        """As many variants as are worth while and fit into what is left, by the peak of one that runs all blocks."""
        most = max(1, _TOKENS_PER_CALL.get(self.model.device.type, 1 << 17) // self.tokens)
        site = next((site for site in self.model.anatomy if site.units), None)
        if site is None:
            return 1
        one = torch.zeros(1, dtype=torch.long, device=self.model.device)
        with self._must_fit(_ONE):
            broadcast = self._broadcasts(site)
            peak = activation_peak(lambda: self._measure(site, one, broadcast))
        if peak > self.left:
            self.calibration.warn_tight("variant", peak, self.left)
        return min(most, whole_steps(self.left, peak))

    def _shrink(self, step: int, error: RuntimeError) -> None:
        if step == 1:
            raise self._too_large(_ONE) from error
        self.step = step // 2
        log.info("out of memory: going on with %d variants in a call", self.step)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @contextmanager
    def _must_fit(self, when: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not ran_out(error):
                raise
            raise self._too_large(when) from error

    def _too_large(self, when: str) -> InputError:
        return InputError(
            f"calibration batch {self.index} does not fit in the memory of {self.model.device}{when}",
            f"use a smaller {param('batch_size')} or {param('max_length')}",
        )
