"""Trials: prune to one budget, measure the result, and keep it in the sweep's folder as a point.

Whatever is there already, made and measured in the same way, is taken as it is: a sweep that was killed goes on where
it stopped. The ranking resumes by itself (`scoring`), a model is there whole or not at all (`export`), and a point is
written after each of its measurements.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from optin_cli import pipeline
from optin_cli.artefacts.changes import changes, explain, explain_new
from optin_cli.artefacts.mask import Mask, write_mask
from optin_cli.artefacts.point import SUFFIX, Point, TimedPoint, read_point, write_point
from optin_cli.artefacts.provenance import library_versions
from optin_cli.artefacts.pruned import FILE_NAME
from optin_cli.compensation.settings import Compensation
from optin_cli.data.batches import Batches
from optin_cli.data.opening import open_batches
from optin_cli.data.sources import DataSpec
from optin_cli.errors import InputError, UsageError, param
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.measure.comparison import compare
from optin_cli.measure.evaluate import evaluate
from optin_cli.measure.inputs import check_setting, default_size
from optin_cli.measure.latency import bench, device_name
from optin_cli.pruning.model_card import add_results
from optin_cli.scoring.plan import Plan
from optin_cli.selection.settings import Request
from optin_cli.trials.settings import Measuring

log = logging.getLogger("optin")

Progress = Callable[[float, float, str], None]
"""Called with (work done, all work, what is being done)."""


@dataclass(frozen=True)
class Recipe:
    """How the points of one series are made, whatever their budget."""

    plan: Plan
    compensation: Compensation
    ranking: Path
    """Written or reused."""
    at_most: bool = True
    """Fewer examples than `compensation` asks for will do."""
    variant: str = ""
    uniform: bool = False
    """All layers get the same size. Such points are timed, too: they are models that one may take."""
    suffix: str = ""
    """Of the names of its points: the variant and the seed."""


@dataclass
class Trials:
    """The points of one folder. Made by `open_trials`."""

    folder: Path
    dense: OpenModel
    """As it is measured: perhaps in another dtype than it is scored in."""
    reopen: Callable[[str], OpenModel]
    """Opens a written point as `dense` is."""
    measuring: Measuring
    batches: Batches
    """What quality is measured on."""
    force: bool = False
    update: bool = False
    """Replace models that were made from other inputs."""
    _warned: set[str] = field(default_factory=set, init=False, repr=False)

    def point(self, recipe: Recipe, request: Request, on_progress: Progress = lambda *_: None) -> Point:
        """The point of a budget: made and measured, as far as it is not there.

        `on_progress` gets shares of one. Raises what `pipeline.prune`, `evaluate` and `bench` raise.
        """
        name = point_name(request, recipe.suffix)
        request = dataclasses.replace(request, uniform=request.uniform or recipe.uniform)
        pruned = pipeline.prune(
            recipe.plan,
            request,
            self.folder / name,
            recipe.ranking,
            compensation=recipe.compensation,
            at_most=recipe.at_most,
            force=self.force,
            update=self.update,
            copied=True,
            on_progress=lambda done, total, what: on_progress(0.7 * done / total if total else 0.7, 1, what),
        )
        write_mask(self.folder / f"{name}.mask.json", pruned.mask)
        found = self._there(name, pruned.mask) if pruned.applied.reused else None
        point = found or Point(
            name=name,
            variant=recipe.variant,
            seed=recipe.plan.settings.seed,
            model={"id": recipe.plan.model.spec, "digest": recipe.plan.model.digest},
            ranking=pruned.mask.ranking_digest,
            mask=pruned.mask.digest,
            budget=pruned.mask.budget,
            reached=pruned.mask.reached,
            params=pruned.applied.params,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=library_versions(),
        )
        return self._measured(point, recipe, on_progress)

    def _there(self, name: str, mask: Mask) -> Point | None:
        path = self.folder / f"{name}{SUFFIX}"
        point = read_point(path) if path.is_file() else None
        return point if point and point.mask == mask.digest else None

    def _measured(self, point: Point, recipe: Recipe, on_progress: Progress) -> Point:
        """The point with what is not measured yet, or was measured in another way."""
        evaluated_on = self._evaluated_on()
        timed = self._timed() if self.measuring.bench and (recipe.uniform or not recipe.variant) else None
        missing_quality = point.evaluation.get("data") != evaluated_on
        missing_speed = timed is not None and point.timed != timed
        self._explain(point, evaluated_on, timed)
        if not (missing_quality or missing_speed):
            return point
        small = self.reopen(str(self.folder / point.name))
        if missing_quality:
            on_progress(0.7, 1, f"evaluating {point.name}")
            quality = evaluate(small, self.batches, self.dense)
            self._warn_once(quality.beyond)
            self._warn_once(quality.unlike)
            point = dataclasses.replace(point, evaluation={"data": evaluated_on, **asdict(quality)})
            self._write(point)
        if missing_speed and timed is not None:
            on_progress(0.85, 1, f"timing {point.name}")
            point = dataclasses.replace(point, timings=self._bench(small), timed=timed)
            self._write(point)
        add_results(self.folder / point.name, point.evaluation, point.timings)
        return point

    def _write(self, point: Point) -> None:
        """Raises `InputError` where somebody has removed the model meanwhile: a point without it is none."""
        if not (self.folder / point.name / FILE_NAME).is_file():
            raise InputError(f"{self.folder / point.name} was removed while it was measured", "run it again")
        write_point(self.folder, point)

    def _explain(self, point: Point, evaluated_on: dict[str, Any], timed: dict[str, Any] | None) -> None:
        """Say what a point that is there was measured on, where that differs; a new one has no measurements."""
        path = self.folder / f"{point.name}{SUFFIX}"
        if not point.evaluation:
            explain_new(path)
            return
        differs = changes(point.evaluation["data"], evaluated_on)
        explain(path, [*differs, *changes(point.timed, timed or {})], [*evaluated_on, *(timed or ())])

    def _warn_once(self, text: str) -> None:
        if text and text not in self._warned:
            log.warning("%s", text)
            self._warned.add(text)

    def _evaluated_on(self) -> dict[str, Any]:
        examples = self.batches.examples
        return {
            "spec": examples.data.spec,
            "split": examples.data.split,
            "fingerprint": examples.fingerprint,
            "examples": self.batches.count,
            "dtype": self.dense.dtype_name,
        }

    def _timed(self) -> dict[str, Any]:
        how = self.measuring
        return {
            "batch_sizes": list(how.bench_batch_size),
            "size": self._size(),
            "repeats": how.repeats,
            "seconds": how.seconds,
            "device": device_name(self.dense.device),
            "dtype": self.dense.dtype_name,
        }

    def _size(self) -> int:
        return self.measuring.seq_len or self.measuring.image_size or default_size(self.dense)

    def _bench(self, small: OpenModel) -> list[TimedPoint]:
        how, models = self.measuring, [self.dense, small]
        timings = bench(
            models, how.bench_batch_size, [self._size()], repeats=how.repeats, seconds=how.seconds
        )
        rows = compare(models, timings)
        return [_timed_point(dense, pruned) for dense, pruned in zip(rows[::2], rows[1::2], strict=True)]


def check_sizes(model: OpenModel, measuring: Measuring) -> None:
    """Raise `UsageError` for a size of inputs that the model does not have."""
    modality = model.family.modality
    images = modality == "image"
    if (measuring.seq_len if images else measuring.image_size) is not None:
        raise UsageError(
            f"{model.spec} reads {modality}{'' if modality == 'audio' else 's'}",
            f"use {param('image_size' if images else 'seq_len')}",
        )


def open_trials(
    folder: Path,
    dense: OpenModel,
    reopen: Callable[[str], OpenModel],
    data: DataSpec,
    measuring: Measuring,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    seed: int = 0,
    force: bool = False,
    update: bool = False,
) -> Trials:
    """Open the data that quality is measured on, and check the settings that are timed.

    Raises what the data raises, and `UsageError` for a setting that the model can't run: before anything is scored.
    """
    batches = open_batches(data, dense, measuring.eval_samples, batch_size, seed, max_length=max_length)
    dense.task.labels(batches)
    trials = Trials(folder, dense, reopen, measuring, batches, force, update)
    if measuring.bench:
        for size in measuring.bench_batch_size:
            check_setting(dense, size, trials._size())
    return trials


def point_name(request: Request, suffix: str = "") -> str:
    """`flops-0.6`, `flops-0.6-memory-60`: the budgets as file names have them."""
    return "-".join(f"{budget.key.replace('_', '-')}-{budget.amount:g}" for budget in request.asked) + suffix


def _timed_point(dense: dict[str, Any], pruned: dict[str, Any]) -> TimedPoint:
    """Two rows of `compare` as one."""
    return TimedPoint(
        batch_size=pruned["setting"]["batch_size"],
        size=pruned["setting"]["size"],
        device=pruned["device"],
        threads=pruned["threads"],
        dtype=pruned["dtype"],
        execution=pruned["execution"],
        dense_ms=dense["median_ms"],
        ms=pruned["median_ms"],
        speedup=pruned["speedup"],
        interval=pruned["speedup_interval"],
        ideal_speedup=pruned["ideal_speedup"],
        throughput=pruned["throughput"],
        dense_throughput=dense["throughput"],
        peak_memory=pruned["peak_memory"],
        dense_peak_memory=dense["peak_memory"],
        saturated=pruned["saturated"],
    )
