"""Timings of pruned models beside the dense one's: speed-up, its interval, its share of the ideal, predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from optin_cli.loading.checkpoint import OpenModel
from optin_cli.measure.latency import Timing, efficiency, ideal_speedup, speedup, speedup_interval
from optin_cli.measure.memory import disk_bytes


def compare(models: Sequence[OpenModel], timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """Timings as plain data, the pruned ones with their speed-up over the dense one of the same setting.

    Where a latency table predicted the pruned model under the very setting, its prediction stands beside.
    """
    rows: list[dict[str, Any]] = []
    for index, timing in enumerate(timings):
        which = models[index % len(models)]
        row = {**asdict(timing), "disk_bytes": disk_bytes(which)}
        del row["times"]
        if which is not models[0]:
            dense = timings[index - index % len(models)]
            ideal = ideal_speedup(models[0], which, timing.setting.size)
            row["speedup"] = speedup(dense, timing)
            row["speedup_interval"] = list(speedup_interval(dense, timing))
            row["ideal_speedup"] = ideal
            row["efficiency"] = efficiency(row["speedup"], ideal)
        if (foretold := prediction(which)) and _same_setting(foretold, timing):
            row["predicted_ms"] = foretold["latency_ms"]
            if which is not models[0] and foretold["of"] == models[0].digest:
                rows[-1]["predicted_ms"] = foretold["table_latency_ms"]
                row["predicted_speedup"] = foretold["table_latency_ms"] / foretold["latency_ms"]
        rows.append(row)
    return rows


def prediction(model: OpenModel) -> dict[str, Any] | None:
    """What a latency table said of a pruned model: milliseconds, and the table's setting."""
    if model.record is None:
        return None
    step = model.record.history[-1]
    table = step["budget"].get("latency_table")
    return {**step["reached"], **table} if table else None


def _same_setting(foretold: dict[str, Any], timing: Timing) -> bool:
    threads = timing.threads if timing.device == "cpu" else 0
    here = (timing.device, timing.dtype, threads, timing.setting.batch_size, timing.setting.size)
    return here == tuple(foretold[key] for key in ("device", "dtype", "threads", "batch_size", "size"))
