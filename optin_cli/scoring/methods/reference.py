"""Reference: the scores of OPTIN's released code, where it departs from the paper. For comparison, never the default.

What it does differently (docs/method.md, section 2), all reproduced here:
- one batch, drawn at random and padded to its longest, padding included; another one for neurons than for heads;
- a block's feature is the raw output of its feed-forward layer, before residual and norm (images: the block's output);
- relations of rows that are drawn again for every unit and feature, a sum over the pairs and not a mean;
- KL at temperature 1, a sum over the batch, times the temperature squared; 0 for models without classes;
- while a block's heads are scored, the earlier blocks lack their last head: its mask was never taken back;
- KL is multiplied by the power of ten that puts it below 1 / lambda_code of the trajectory, truncated toward zero,
  so that only its mantissa is left; where KL is the larger one, by the mean of the powers of the units before;
  lambda_code = 10 is 1 / lambda of the paper;
- the sum is multiplied by an envelope over the unit's index, from 10 to 1 over heads and from 100 to 1 over neurons,
  and, by its settings, halved in the last block, and for heads;
- heads of image models are never masked where it counts: they stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from optin_cli.artefacts.ranking import RankedSite
from optin_cli.execution.memory import ran_out
from optin_cli.execution.replay import Replay
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.scoring.calibration import Calibration, Scores, gather_rows, measured_blocks
from optin_cli.scoring.losses import output_change, relational_change
from optin_cli.scoring.methods.ablation import run_units, unit_items
from optin_cli.scoring.methods.base import Arrays, Item, OnWork, ScoringMethod
from optin_cli.scoring.settings import ScoreSettings
from optin_cli.structure.anatomy import HEADS, NEURONS, TOKENS, Site
from optin_cli.structure.hidden_states import as_rows, hidden_of
from optin_cli.tasks.divergence import SQUARES
from optin_cli.transforms.masking import masked

_ENVELOPE = {HEADS: 10.0, NEURONS: 100.0}
_DECAY = {HEADS: 0.5, NEURONS: 1.0}
_LAST_BLOCK_DECAY = 0.5
_TOKENS_PER_CALL = {"cpu": 4096, "cuda": 1 << 16}


class ReferenceMethod(ScoringMethod):
    """OPTIN's released code. A site is scored on one batch: the first for heads, the second for neurons."""

    name = "reference"
    kinds = frozenset({HEADS, NEURONS})
    shuffled = True
    batches_compare = False
    output_weight = 0.1

    def __init__(
        self, calibration: Calibration, settings: ScoreSettings, labels: list[Any] | None = None
    ) -> None:
        super().__init__(calibration, settings, labels)
        self._recorded: tuple[int, Reference] | None = None

    @classmethod
    def misfit(cls, model: OpenModel) -> str:
        blocks = model.anatomy.blocks
        shared = len(set(blocks)) < len(blocks)
        return super().misfit(model) or (
            f"does not score {model.spec}, whose blocks share their weights" if shared else ""
        )

    def columns(self, site: Site) -> list[int]:
        return measured_blocks(site, len(self.anatomy.blocks))

    def items(self) -> list[Item]:
        depth, second = len(self.anatomy.blocks), min(1, len(self.calibration) - 1)
        text = self.model.family.modality != "image"  # heads of image models stay
        return [
            item
            for site in self.anatomy
            if site.kind == NEURONS or text
            for item in unit_items(self.name, 0 if site.kind == HEADS else second, site, depth)
        ]

    def run(self, item: Item, on_work: OnWork) -> Arrays:
        if self._recorded is None or self._recorded[0] != item.batch:
            reduced = self.settings.precision == "reduced"
            self._recorded = item.batch, Reference(self.calibration, item.batch, reduced)
        return run_units(self._recorded[1], self.anatomy[item.site], item, on_work)

    def release(self) -> None:
        self._recorded = None

    def weight(self, item: Item) -> float:
        return 1.0  # one batch is all it looks at

    def combine(self, sites: list[RankedSite]) -> dict[str, np.ndarray]:
        return combine(sites, self.settings.output_weight or 0.0)


class Reference:
    """Scores units on one batch, kept whole. `Replay` gives what full masked forwards give."""

    def __init__(self, calibration: Calibration, index: int, reduced: bool = False) -> None:
        self.calibration = calibration
        self.reduced = reduced
        self.model = calibration.model
        self.index = index
        self.batch = calibration.batch(index)
        self.paths = _feature_paths(self.model)
        self.dense: dict[int, Tensor] = {}
        with torch.inference_mode(), self._features(self.dense):
            self.output = self.model.output(self.batch.inputs)
        calibration.check_finite(self.dense, index)
        examples, tokens = self.dense[0].shape[:2]
        self.step = max(1, _TOKENS_PER_CALL.get(self.model.device.type, 1 << 16) // (examples * tokens))
        self._replay: tuple[int, Replay] | None = None

    @torch.inference_mode()
    def score(
        self, site: Site, units: np.ndarray, on_units: Callable[[int], None] = lambda _: None
    ) -> Scores:
        """(trajectory [units, columns], output [units]) of some units of a site, neither rescaled nor enveloped."""
        replay = self._recorded(site)
        columns = measured_blocks(site, len(self.paths))
        # a broadcast run changes the consumer's output behind a hook's back: no feature may be that
        inside = site.consumer in [self.paths[z] for z in columns]
        broadcast = not inside and replay.broadcasts(site)
        sites = self.model.anatomy.sites
        earlier = sum(other.units for other in sites[: sites.index(site)])
        trajectory, output = np.zeros((len(units), len(columns))), np.zeros(len(units))
        start = 0
        while start < len(units):
            chosen = torch.as_tensor(units[start : start + self.step], device=self.model.device)
            try:
                one, two = self._measure(replay, site, chosen, broadcast, earlier)
            except RuntimeError as error:
                if not ran_out(error) or self.step == 1:
                    raise
                self.step //= 2
                continue
            trajectory[start : start + len(chosen)], output[start : start + len(chosen)] = one, two
            start += len(chosen)
            on_units(len(chosen))
        return trajectory, output

    def _measure(self, replay: Replay, site: Site, units: Tensor, broadcast: bool, earlier: int) -> Scores:
        features: dict[int, Tensor] = {}
        with self._features(features, measured_blocks(site, len(self.paths))):
            _, outputs = replay.run(site, units, broadcast)
        split = {z: f.reshape(len(units), *self.dense[z].shape) for z, f in features.items()}
        relations = [
            self._relations({z: f[row] for z, f in split.items()}, earlier + unit)
            for row, unit in enumerate(units.tolist())
        ]
        return np.array(relations), self._divergence(outputs)

    def _recorded(self, site: Site) -> Replay:
        """The pass that a site's variants start from: for heads, without the last head of every earlier block."""
        depth = site.block if site.kind == HEADS else 0
        if self._replay is None or self._replay[0] != depth:
            left = {
                s.name: (torch.arange(s.units, device=self.model.device) < s.units - 1).float()
                for s in self.model.anatomy
                if s.kind == HEADS and s.block < depth
            }
            with masked(self.model.module, self.model.anatomy, left):
                self._replay = depth, Replay(self.model, self.batch, self.reduced)
        return self._replay[1]

    def _relations(self, variant: dict[int, Tensor], number: int) -> list[float]:
        """||R - R'||_F^2 of every feature of unit `number` of all, each on different rows."""
        generator = self.calibration.generator(self.index, stream=1 + number)
        found = []
        for z, feature in sorted(variant.items()):
            slots = feature.shape[0] * feature.shape[1]
            rows = torch.randperm(slots, generator=generator)[: self.calibration.rows].to(feature.device)
            dense = gather_rows(self.dense[z], rows)
            change = relational_change(dense, gather_rows(feature, rows)[None])
            found.append(float(change) * len(rows) ** 2)
        return found

    def _divergence(self, outputs: Tensor) -> np.ndarray:
        """KL(dense || variant) of the undivided logits, a sum over all rows, times the squared temperature: (v,)."""
        if self.model.task.term == SQUARES:
            return np.zeros(len(outputs))
        everything = torch.ones(self.output.shape[:2], device=self.output.device)
        change = output_change(self.output, outputs, everything, temperature=1.0, term=self.model.task.term)
        return change.clamp(min=0).cpu().numpy() * self.calibration.temperature**2

    @contextmanager
    def _features(self, found: dict[int, Tensor], blocks: Sequence[int] | None = None) -> Iterator[None]:
        """Within the context, collect the features of `blocks` (all of them for None)."""
        # a consumer's output, the feature of a text model, has no layout
        anatomy = self.model.anatomy
        laid = self.paths == list(anatomy.blocks)
        with ExitStack() as stack:
            for z, path in enumerate(self.paths):
                if blocks is None or z in blocks:

                    def keep(_: nn.Module, __: Any, output: Any, z: int = z) -> None:
                        layout = anatomy.stream_of(z).layout if laid else TOKENS
                        found[z] = as_rows(hidden_of(output), layout)

                    stack.callback(self.model.module.get_submodule(path).register_forward_hook(keep).remove)
            yield


def _feature_paths(model: OpenModel) -> list[str]:
    """The module whose output is each block's feature."""
    blocks = list(model.anatomy.blocks)
    if model.family.modality == "image":
        return blocks
    consumers = {site.block: site.consumer for site in model.anatomy if site.kind == NEURONS}
    return [consumers.get(z, path) for z, path in enumerate(blocks)]


def combine(sites: Iterable[RankedSite], weight: float) -> dict[str, np.ndarray]:
    """Scores from their parts, as the released code forms them; `weight` is the paper's lambda.

    Heads that were not scored get what all neurons have together: they are the last to go.
    """
    sites = sorted(sites, key=lambda site: site.block)
    last = max((site.block for site in sites), default=0)
    scores: dict[str, np.ndarray] = {}
    for kind in dict.fromkeys(site.kind for site in sites):
        powers = _Powers(weight)
        for site in (s for s in sites if s.kind == kind):
            total = site.trajectory.sum(axis=1)
            divergence = np.array([k * powers.of(t, k) for t, k in zip(total, site.output, strict=True)])
            decay = _DECAY[kind] * (_LAST_BLOCK_DECAY if site.block == last else 1.0)
            envelope = np.geomspace(1, _ENVELOPE[kind], site.units)[::-1]
            scores[site.name] = (total + divergence) * envelope * decay
    kept = sum(float(scores[s.name].sum()) for s in sites if s.kind == NEURONS)
    for site in sites:
        if site.kind == HEADS and not site.trajectory.any() and not site.output.any():
            scores[site.name] = np.full(site.units, kept)
    return scores


class _Powers:
    """The power of ten that each unit's KL is multiplied by, in the order of scoring."""

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.sum, self.count = 0.0, 0

    def of(self, trajectory: float, divergence: float) -> float:
        if self.weight == 0:
            return 0.0
        if trajectory > divergence > 0:
            power = 10.0 ** int(math.log10(trajectory) - math.log10(divergence) + math.log10(self.weight))
            self.sum, self.count = self.sum + power, self.count + 1
            return power
        return self.sum / self.count if self.count else 1.0
