"""Write a report: the page, the pictures, the table."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optin_cli.artefacts.files import atomic_file, check_output
from optin_cli.artefacts.point import Point
from optin_cli.errors import UsageError, param
from optin_cli.reporting.collect import Budget, Report, collect
from optin_cli.reporting.page import page


def write(
    paths: Sequence[str | Path],
    output: Path | None = None,
    png: Path | None = None,
    table: Path | None = None,
) -> list[Path]:
    """Read the artefacts and write what is asked for; returns the files.

    Raises what `collect` raises, `UsageError` where nothing is to be written or can be.
    """
    if output is None and png is None and table is None:
        raise UsageError(
            "nothing is to be written",
            f"give {param('output', meta='FILE.html')}, {param('png', meta='DIR')} or {param('csv', meta='FILE.csv')}",
        )
    for path, kind in ((output, "report"), (table, "table")):
        if path is not None:
            check_output(path, kind)
    report = collect(paths)
    written = []
    if output is not None:
        _write_text(output, page(report))
        written.append(output)
    if png is not None:
        from optin_cli.reporting.pictures import pictures

        written += pictures(report, png)
    if table is not None:
        _write_text(table, to_csv(report))
        written.append(table)
    return written


def _write_text(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def to_csv(report: Report) -> str:
    """A row for each point of the sweep; without one, for each budget."""
    rows = [_point_row(point) for point in report.points] or [
        _budget_row(budget) for budget in report.budgets
    ]
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _point_row(point: Point) -> dict[str, Any]:
    row = {
        "name": point.name,
        "variant": point.variant,
        "seed": point.seed,
        "macs": point.reached["macs"],
        "dense_macs": point.reached["dense_macs"],
        "macs_share": point.share,
        "params": point.params,
        "dense_params": point.reached["dense_params"],
        "drop": point.drop,
    }
    found = point.evaluation
    row |= found.get("metrics", {})
    row |= {f"dense_{name}": value for name, value in found.get("baseline_metrics", {}).items()}
    row |= found.get("fidelity", {})
    for timing in point.timings:
        batch = timing["batch_size"]
        row |= {
            f"ms_batch_{batch}": timing["ms"],
            f"dense_ms_batch_{batch}": timing["dense_ms"],
            f"speedup_batch_{batch}": timing["speedup"],
            f"speedup_low_batch_{batch}": timing["interval"][0],
            f"speedup_high_batch_{batch}": timing["interval"][1],
        }
    return row


def _budget_row(budget: Budget) -> dict[str, Any]:
    reached: Mapping[str, Any] = budget.reached or {}
    return {
        "name": budget.label,
        "macs": reached.get("macs"),
        "dense_macs": reached.get("dense_macs"),
        "params": reached.get("params"),
        "dense_params": reached.get("dense_params"),
        "score_kept": budget.score,
        **{f"kept_{name}": count for name, count in budget.kept.items()},
    }
