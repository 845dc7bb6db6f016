"""About how long scoring takes, extrapolated from small parts of its work."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from optin_cli.execution.allocator import freed_memory_kept
from optin_cli.scoring.methods.base import Item
from optin_cli.scoring.plan import Plan
from optin_cli.scoring.runner import Worker

Clock = Callable[[], float]
_SECONDS = 1.0
"""A timing takes about so long at most, or as long as two rows."""


@dataclass(frozen=True)
class Timing:
    """One call of an engine."""

    tokens: int
    work: float
    seconds: float


@dataclass(frozen=True)
class Law:
    """Seconds of an item by its work w and tokens n: (t + a (w - w0)) (1 + r (n - n0)), t those of w0 on n0.

    Linear in both. Attention grows with the square of a text's length: it counts as it does in the texts timed.
    """

    start: Timing
    by_work: float
    """a, in seconds."""
    by_tokens: float
    """r, a share of `start` for each token."""

    @classmethod
    def through(cls, start: Timing, more_work: Timing, more_tokens: Timing) -> Law:
        """The law that gives all three timings. Where one has no more than `start`, seconds are in proportion to that.

        Timings scatter: nothing gets faster with work or tokens, nor slower than in proportion to tokens.
        """
        by_work = start.seconds / start.work if start.work else 0.0
        if more_work.work > start.work:
            by_work = max(0.0, (more_work.seconds - start.seconds) / (more_work.work - start.work))
        by_tokens = 1 / start.tokens
        if more_tokens.tokens > start.tokens and start.seconds > 0:
            growth = (more_tokens.seconds / start.seconds - 1) / (more_tokens.tokens - start.tokens)
            by_tokens = min(max(0.0, growth), by_tokens)
        return cls(start, by_work, by_tokens)

    def seconds(self, tokens: float, work: float) -> float:
        by_work = self.start.seconds + self.by_work * (work - self.start.work)
        return by_work * (1 + self.by_tokens * (tokens - self.start.tokens))


def estimate_seconds(plan: Plan, clock: Clock = time.perf_counter) -> float:
    """About how long scoring will take, from small parts of each kind of work on a few rows of the middle batch."""
    with plan.model.unmerged(), freed_memory_kept():
        return _timed(plan, clock)


def _timed(plan: Plan, clock: Clock) -> float:
    batches, seconds = plan.calibration.batches, 0.0
    items = Worker(plan).items()
    for engine in dict.fromkeys(item.engine for item in items):
        same = [item for item in items if item.engine == engine]
        here = [item for item in same if item.batch == len(batches) // 2] or same
        # the dearest and the cheapest: the cost of an ablation falls with depth
        ends = {item.key: item for item in (here[0], here[-1])}.values()
        laws = [(item, _law(plan, item, clock)) for item in ends]
        seconds += sum(_between(laws, item, batches.tokens(item.batch)) for item in same)
    return seconds


def _between(laws: Sequence[tuple[Item, Law]], item: Item, tokens: int) -> float:
    """Seconds of an item by the laws of one or two others; between two, a unit's are linear in its work."""
    if len(laws) == 1:
        return laws[0][1].seconds(tokens, item.work)
    works = [other.work / _count(other) for other, _ in laws]
    each = [law.seconds(tokens, other.work) / _count(other) for other, law in laws]
    units = _count(item)
    share = (item.work / units - works[0]) / (works[1] - works[0]) if works[0] != works[1] else 0.5
    return units * max(0.0, each[0] + share * (each[1] - each[0]))


def _count(item: Item) -> int:
    return max(1, len(item.units))


def _law(plan: Plan, item: Item, clock: Clock) -> Law:
    """Time an item on one row, with more work, and on as many rows as do not take long."""
    one = _Part(plan, item.batch, 1, clock)
    small, large = one.worker.method.samples(item)
    one.run(small)  # the first call also pays for warming up
    start = one.timed(small)
    more_work = one.timed(large) if large.work > small.work else start
    quick = start.seconds < _SECONDS
    rows = int(_SECONDS / start.seconds) if quick and start.seconds else 2
    more = _Part(plan, item.batch, max(2, rows), clock)
    if more.tokens <= one.tokens:
        return Law.through(start, more_work, start)
    more.calibration.graph_slots = one.calibration.graph_slots  # measured
    if quick:
        more.run(small)
    return Law.through(start, more_work, more.timed(small))


class _Part:
    """Some rows of a batch, to run items on."""

    def __init__(self, plan: Plan, batch: int, rows: int, clock: Clock) -> None:
        batches = plan.calibration.batches.part(batch, rows)
        self.tokens, self.clock = max(1, batches.tokens(0)), clock
        self.calibration = replace(plan.calibration, batches=batches)
        self.worker = Worker(replace(plan, calibration=self.calibration))

    def run(self, item: Item) -> None:
        self.worker.run(replace(item, batch=0))

    def timed(self, item: Item) -> Timing:
        started = self.clock()
        self.run(item)
        return Timing(self.tokens, item.work, self.clock() - started)
