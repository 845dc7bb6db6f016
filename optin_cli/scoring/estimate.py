"""About how long scoring takes."""

from __future__ import annotations

import time
from dataclasses import replace

from optin_cli.scoring.methods.base import Item
from optin_cli.scoring.plan import Plan
from optin_cli.scoring.runner import Worker


def estimate_seconds(plan: Plan) -> float:
    """About how long scoring will take: one call of each kind of work is timed on the middle batch."""
    with plan.model.unmerged():
        return _timed(plan)


def _timed(plan: Plan) -> float:
    middle = len(plan.calibration) // 2
    worker, seconds = Worker(plan), 0.0
    items = worker.items()
    for engine in dict.fromkeys(item.engine for item in items):
        same = [item for item in items if item.engine == engine]
        here = [item for item in same if item.batch == middle] or same
        # the dearest and the cheapest: the cost of an ablation falls with depth
        timed = [_shortened(here[0]), _shortened(here[-1])]
        for item in timed:
            worker.run(item)  # the first call also pays for warming up
            started = time.perf_counter()
            worker.run(item)
            each = (time.perf_counter() - started) / item.work
            seconds += each * sum(i.work for i in same) / len(timed)
    return seconds


def _shortened(item: Item) -> Item:
    """A small part of an item."""
    first, stop = item.probes
    units, probes = item.units[:16], (first, min(first + 1, stop))
    share = len(units) / len(item.units) if units else 1 / max(1, stop - first)
    return replace(item, units=units, probes=probes, work=item.work * share)
