"""Timings of pruned models beside the dense one's: speed-up, its interval, its share of the ideal, predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


CSV_COLUMNS = (
    "model",
    "infer_samples_per_sec",
    "infer_step_time",
    "infer_batch_size",
    "infer_img_size",
    "infer_gmacs",
    "param_count",
)
"""The names that timm's benchmark.py gives them: milliseconds, GMACs of an example, millions of parameters."""


def csv_rows(rows: Sequence[Mapping[str, Any]], images: bool) -> list[dict[str, Any]]:
    """Rows of `compare` with timm's columns first, then those that it does not have: `infer_seq_len` for what is no
    image, quantiles, memory, speed-up, and the way that it was run."""
    found = []
    for row in rows:
        size = row["setting"]["size"]
        low, high = row.get("speedup_interval", ("", ""))
        found.append(
            {
                "model": row["model"],
                "infer_samples_per_sec": round(row["throughput"], 2),
                "infer_step_time": round(row["median_ms"], 3),
                "infer_batch_size": row["setting"]["batch_size"],
                "infer_img_size": size if images else "",
                "infer_gmacs": round(row["macs"] / 1e9, 4),
                "param_count": round(row["params"] / 1e6, 3),
                "infer_seq_len": "" if images else size,
                "p10_ms": round(row["p10_ms"], 3),
                "p90_ms": round(row["p90_ms"], 3),
                "peak_memory_mib": "" if row["peak_memory"] is None else round(row["peak_memory"] / 2**20, 1),
                "speedup": row.get("speedup", ""),
                "speedup_low": low,
                "speedup_high": high,
                "ideal_speedup": row.get("ideal_speedup", ""),
                "point": row["point"],
                "device": row["device"],
                "threads": row["threads"],
                "dtype": row["dtype"],
                "execution": row["execution"],
            }
        )
    return found
