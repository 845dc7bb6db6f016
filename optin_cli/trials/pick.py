"""`pick`: the best of several measured models that keeps a promise about quality, speed-up or latency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from optin_cli.artefacts.point import Point, TimedPoint, change_words
from optin_cli.errors import GateError, UsageError, param
from optin_cli.selection.settings import Request
from optin_cli.sizes import check_numbers

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Promise:
    """What a model must keep. All that are given hold together. Raises `UsageError` for none, and for no number."""

    max_drop: float | None = field(
        default=None,
        metadata={
            "metavar": "POINTS",
            "help": "Points of the main metric that may be lost (error rate: gained; perplexity: per cent; no labels: "
            "agreement).",
        },
    )
    min_speedup: float | None = field(
        default=None,
        metadata={
            "metavar": "TIMES",
            "help": "Measured speed-up over the dense model, at the largest batch timed.",
        },
    )
    max_latency: float | None = field(
        default=None,
        metadata={"metavar": "MS", "help": "Measured latency, e.g. 8ms, at the smallest batch timed."},
    )
    """Milliseconds."""
    batch_size: int | None = field(
        default=None, metadata={"least": 1, "help": "Batch size that both are about, if there are several."}
    )

    def check(self) -> None:
        """Raise `UsageError` where nothing is promised, and for amounts that are none."""
        if not self.asked:
            raise UsageError(
                "nothing is promised",
                f"give {param('max_drop', 1.0)}, {param('min_speedup', 1.5)} or {param('max_latency', meta='8ms')}",
            )
        check_numbers(Promise, vars(self))
        for name in ("min_speedup", "max_latency"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{param(name, float(value))}: must be positive")

    @property
    def asked(self) -> list[str]:
        return [
            name for name in ("max_drop", "min_speedup", "max_latency") if getattr(self, name) is not None
        ]

    def excess(self, point: Point) -> dict[str, float]:
        """Promise -> by how much a point misses it, as a share of what was asked; 0 and less is kept.

        Raises `UsageError` for a promise about what was not measured.
        """
        found = {}
        if self.max_drop is not None:
            if point.drop is None:
                raise UsageError(
                    f"{point.name} has no measured drop", "sweep again, with labels or another --eval-data"
                )
            found["max_drop"] = (point.drop - self.max_drop) / max(abs(self.max_drop), 1.0)
        if self.min_speedup is not None:
            found["min_speedup"] = 1 - self._timing(point, largest=True)["speedup"] / self.min_speedup
        if self.max_latency is not None:
            found["max_latency"] = self._timing(point, largest=False)["ms"] / self.max_latency - 1
        return found

    def kept(self, point: Point) -> bool:
        """Whether a point keeps all of it."""
        return all(value <= _ROUNDING for value in self.excess(point).values())

    def measured(self, point: Point) -> str:
        """What a point has of what was asked: `drops by 1.30 points, 1.42x at batch 32`."""
        parts = []
        if self.max_drop is not None:
            assert point.drop is not None
            parts.append(change_words(point.evaluation.get("main", ""), point.drop))
        if self.min_speedup is not None:
            timing = self._timing(point, largest=True)
            parts.append(f"{timing['speedup']:.2f}x at batch {timing['batch_size']}")
        if self.max_latency is not None:
            timing = self._timing(point, largest=False)
            parts.append(f"{timing['ms']:.2f} ms at batch {timing['batch_size']}")
        return ", ".join(parts)

    def _timing(self, point: Point, *, largest: bool) -> TimedPoint:
        sizes = sorted({timing["batch_size"] for timing in point.timings})
        if not sizes:
            raise UsageError(f"{point.name} was not timed", f"sweep again with {param('bench', True)}")
        wanted = self.batch_size or (sizes[-1] if largest else sizes[0])
        found = point.timing(wanted)
        if found is None:
            raise UsageError(
                f"{point.name} was not timed at batch {wanted}", f"it was at {', '.join(map(str, sizes))}"
            )
        return found


def promised(promise: Promise, request: Request, steps: int) -> bool:
    """Whether a budget is to be found that keeps a promise. Raises `UsageError` for a budget beside it, for steps, and
    for neither budget nor promise."""
    if not promise.asked:
        request.check()
        return False
    if request.asked:
        raise UsageError(
            f"{param(promise.asked[0])} finds the budget itself, and {request.asked[0].asked} is one",
            "leave one of them out",
        )
    if steps > 1:
        raise UsageError(
            f"{param('steps')} reaches a budget, and {param(promise.asked[0])} gives none",
            f"leave {param('steps')} out",
        )
    promise.check()
    return True


def pick(points: Sequence[Point], promise: Promise, where: str) -> Point:
    """The best of `points` that keeps the promise: the fewest MACs where a drop is allowed, else the smallest drop.

    Points that were not measured for the promise, such as the untimed ones of variants, are left out, unless all are.
    Raises `GateError` with the nearest miss if none keeps it, and `UsageError` if none was measured for it.
    """
    promise.check()
    usable, reasons = [], []
    for point in points:
        try:
            promise.excess(point)
        except UsageError as error:
            reasons.append(error)
        else:
            usable.append(point)
    if not usable:
        raise reasons[0] if reasons else UsageError(f"{where} holds no models")
    kept = [point for point in usable if promise.kept(point)]
    if not kept:
        nearest = min(usable, key=lambda point: max(promise.excess(point).values()))
        asked = ", ".join(param(name, float(getattr(promise, name))) for name in promise.asked)
        raise GateError(
            f"no model of {where} keeps {asked}: the nearest is {nearest.name}: {promise.measured(nearest)}",
            "promise less, or sweep more budgets",
        )
    return min(kept, key=_size if promise.max_drop is not None else _loss)


def _size(point: Point) -> tuple[float, float]:
    return point.share, _loss(point)[0]


def _loss(point: Point) -> tuple[float, float]:
    """The drop; without one, larger models come first."""
    return 0.0 if point.drop is None else point.drop, -point.share
