"""A point of a sweep: one pruned model with what it was asked to be, what it keeps, how good and how fast it is. JSON.

A sweep is a folder: `<name>/` is the model of a point, `<name>.mask.json` its mask, `<name>.point.json` the point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NotRequired, TypedDict

from optin_cli.artefacts.facts import Asked, PrunedModel, Reached
from optin_cli.artefacts.files import atomic_file, nearest_path, read_record, to_json
from optin_cli.errors import ArtefactError, UsageError

FORMAT = "optin-sweep-point"
SCHEMA_VERSION = 1
SUFFIX = ".point.json"


class Measured(TypedDict):
    """The quality of a point, as `optin eval` measures it. Metrics are in points."""

    data: dict[str, Any]
    """Name, split and rows of what was measured on."""
    task: str
    examples: int
    main: str
    """The metric that `drop` is about; '' where the data has no labels."""
    metrics: dict[str, float]
    baseline_metrics: dict[str, float]
    fidelity: dict[str, float]
    drop: float | None


class TimedPoint(TypedDict):
    """The speed of a point at one setting, beside the dense model's."""

    batch_size: int
    size: int
    device: str
    threads: int
    dtype: str
    execution: str
    dense_ms: float
    """Median, as `ms`."""
    ms: float
    speedup: float
    interval: list[float]
    """[low, high]: 95 % bootstrap interval of the speed-up."""
    ideal_speedup: float
    throughput: float
    """Examples a second, as `dense_throughput`."""
    dense_throughput: float
    peak_memory: int
    """Bytes, as `dense_peak_memory`."""
    dense_peak_memory: int
    saturated: NotRequired[bool]


@dataclass(frozen=True)
class Point:
    """See the module's docstring."""

    name: str
    """`flops-0.6`: the budget, then the variant and the seed where there are several."""
    variant: str
    """'' for the sweep's own settings; `random` or `uncompensated`."""
    seed: int
    model: PrunedModel
    """The dense model."""
    ranking: str
    """Digest, as `mask`."""
    mask: str
    budget: Asked
    reached: Reached
    params: int
    """Parameters of the pruned model."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """A `Measured`; empty until it is measured."""
    timings: list[TimedPoint] = field(default_factory=list)
    """One for each setting; empty where nothing was timed."""
    timed: dict[str, Any] = field(default_factory=dict)
    """The settings that were timed."""
    created: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """MACs kept, as a share of the dense model's."""
        return self.reached["macs"] / self.reached["dense_macs"]

    @property
    def drop(self) -> float | None:
        """Points of the main metric that were lost (of an error rate: gained; of perplexity: per cent), or of agreement
        with the dense model; None if not measured."""
        found: float | None = self.evaluation.get("drop")
        return found

    @property
    def group(self) -> str:
        """The name without the seed: points of one group differ in it alone."""
        return self.name.removesuffix(f"-seed{self.seed}")

    @property
    def quality(self) -> tuple[str, float] | None:
        """(metric, value) of the task; without labels how alike it is to the dense model; None if not measured."""
        main, fidelity = self.evaluation.get("main"), self.evaluation.get("fidelity", {})
        if main:
            return main, self.evaluation["metrics"][main]
        return next(iter(fidelity.items()), None)

    def timing(self, batch_size: int) -> TimedPoint | None:
        """The timing at a batch size; of several sizes of inputs the first. None if there is none."""
        return next((one for one in self.timings if one["batch_size"] == batch_size), None)


def change_words(metric: str, drop: float) -> str:
    """`drops by 1.300 points`, or `rises by 5.000 per cent`: what a `drop` of a metric means, '' being agreement."""
    if metric == "perplexity":
        return f"rises by {drop:.3f} per cent"
    return f"{'rises' if metric.endswith('error_rate') else 'drops'} by {drop:.3f} points"


@dataclass(frozen=True)
class Sweep:
    """The points of a folder, the largest model first."""

    folder: Path
    points: tuple[Point, ...]

    def directory(self, point: Point) -> Path:
        """The folder of a point's model."""
        return self.folder / point.name

    @property
    def main(self) -> tuple[Point, ...]:
        """The points of the sweep's own settings, without variants."""
        return tuple(point for point in self.points if not point.variant)


def write_point(folder: Path, point: Point) -> None:
    """Write `<name>.point.json`: the whole file or nothing."""
    with atomic_file(folder / f"{point.name}{SUFFIX}") as temporary:
        content = {"format": FORMAT, "schema_version": SCHEMA_VERSION, **asdict(point)}
        temporary.write_text(to_json(content) + "\n")


def read_point(path: str | Path) -> Point:
    """Read a point. Raises `UsageError` for a path that can't be read, `ArtefactError` for anything else than one."""
    return read_record(
        Path(path), Point, "a point of a sweep", FORMAT, SCHEMA_VERSION, maker="optin sweep",
        optional=("evaluation", "timings", "timed", "created", "versions"),
    )  # fmt: skip


def read_sweep(folder: str | Path) -> Sweep:
    """Read all points of a sweep's folder.

    Raises `UsageError` for a folder that is not there or holds no point, `ArtefactError` for damaged points and for
    points of several dense models.

    Example:
        >>> [point.name for point in optin.read_sweep(folder / "sweep").points]
        ['flops-0.8', 'flops-0.6']
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"no sweep at {folder}", nearest_path(folder) or "make one with `optin sweep`")
    points = [read_point(path) for path in sorted(folder.glob(f"*{SUFFIX}"))]
    if not points:
        raise UsageError(f"{folder} holds no points of a sweep", "make them with `optin sweep`")
    models = {point.model["digest"]: point.model["id"] for point in points}
    if len(models) > 1:
        raise ArtefactError(
            f"{folder} has points of several models: {', '.join(models.values())}",
            "keep each in its own folder",
        )
    return Sweep(folder, tuple(sorted(points, key=lambda point: (point.variant, -point.share, point.name))))


@dataclass(frozen=True)
class OverSeeds:
    """The drop of the points that differ in their seed alone."""

    name: str
    seeds: int
    share: float
    """Mean of the MACs kept."""
    drop: float
    """Mean."""
    deviation: float
    """Standard deviation over the seeds; 0 of one."""


def over_seeds(points: Sequence[Point]) -> list[OverSeeds]:
    """The mean and spread of the measured drops, group by group."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        if point.drop is not None:
            groups.setdefault(point.group, []).append(point)
    found = []
    for name, group in groups.items():
        drops = [point.drop or 0.0 for point in group]
        spread = stdev(drops) if len(drops) > 1 else 0.0
        found.append(OverSeeds(name, len(group), fmean(p.share for p in group), fmean(drops), spread))
    return found
