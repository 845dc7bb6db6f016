"""The trade-off of a sweep: quality and agreement against the MACs kept and against measured latency."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from optin_cli.artefacts.point import Point
from optin_cli.reporting.charts import Chart, Series, Spot, chart

STYLES = ("main", "uncompensated", "random")
NAMES = {"main": "pruned", "uncompensated": "not compensated", "random": "random units"}
_POINTS = {"agreement", "cosine", "top10_overlap"}

Reading = Callable[[Point], float | None]


def series(points: Sequence[Point], x: Reading, y: Reading, unit: str) -> list[Series]:
    """The points with both values, a series for each variant."""
    found = []
    for style in STYLES:
        spots = []
        for point in points:
            if (point.variant or "main") != style:
                continue
            across, up = x(point), y(point)
            if across is not None and up is not None:
                label = f"{point.name}: {up:.2f} at {across:.4g} {unit}"
                spots.append(Spot(across, up, label, point.group))
        if spots:
            found.append(Series(NAMES[style], style, tuple(spots)))
    return found


def charts(points: Sequence[Point]) -> list[Chart]:
    """As many of the four as there are measurements for; nothing for points that were not measured."""
    found = []
    batch = timed_batch(points)
    costs: list[tuple[str, str, str, Reading]] = [("MACs", "MACs kept, % of the dense model's", "%", share)]
    if batch is not None:
        label = f"latency of a batch of {batch}, ms"
        costs.append((f"latency at batch {batch}", label, "ms", lambda point: latency(point, batch)))
    main = next((point.evaluation["main"] for point in points if point.evaluation.get("main")), "")
    for cost, x_label, unit, x in costs:
        for name in ([main] if main else []) + alike(points):
            some = series(points, x, reading(name, name == main), unit)
            if not some:
                continue
            if (spot := dense_spot(points, name, name == main, batch if unit == "ms" else None)) is not None:
                some.append(Series("dense", "dense", (spot,)))
            shown = name.replace("_", " ")
            found.append(chart(f"{shown} against {cost}", x_label, shown, some))
    return found


def reading(name: str, metric: bool) -> Reading:
    """Reads a metric of the task, or a measure of agreement, from a point."""
    where = "metrics" if metric else "fidelity"

    def read(point: Point) -> float | None:
        value: float | None = point.evaluation.get(where, {}).get(name)
        return value

    return read


def share(point: Point) -> float:
    """MACs kept, in per cent."""
    return 100 * point.share


def latency(point: Point, batch: int | None) -> float | None:
    """Median milliseconds of a batch."""
    timing = point.timing(batch) if batch is not None else None
    return timing["ms"] if timing else None


def alike(points: Sequence[Point]) -> list[str]:
    """The measure of agreement with the dense model that is in points, if there is one."""
    names = [name for point in points for name in point.evaluation.get("fidelity", {})]
    return [name for name in dict.fromkeys(names) if name in _POINTS][:1]


def timed_batch(points: Sequence[Point]) -> int | None:
    """The largest batch size that was timed."""
    return max((timing["batch_size"] for point in points for timing in point.timings), default=None)


def dense_spot(points: Sequence[Point], name: str, metric: bool, batch: int | None) -> Spot | None:
    """Where the dense model is in a chart; a batch: on an axis of latency. None if it was not measured."""
    values = (
        [p.evaluation["baseline_metrics"].get(name) for p in points if p.evaluation] if metric else [100.0]
    )
    value = next((value for value in values if value is not None), None)
    if value is None:
        return None
    if batch is None:
        return Spot(100.0, value, f"dense: {value:.2f}")
    times = [timing["dense_ms"] for point in points if (timing := point.timing(batch))]
    middle = sorted(times)[len(times) // 2]
    return Spot(middle, value, f"dense: {value:.2f} at {middle:.4g} ms")
