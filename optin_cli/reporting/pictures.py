"""The charts of a report as PNG files, for papers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from optin_cli.artefacts.files import atomic_file
from optin_cli.errors import UsageError
from optin_cli.reporting.charts import ranks
from optin_cli.reporting.collect import Report
from optin_cli.reporting.costs import block_costs
from optin_cli.reporting.page import HEADS, fits
from optin_cli.reporting.tradeoff import (
    NAMES,
    STYLES,
    alike,
    dense_spot,
    latency,
    reading,
    series,
    share,
    timed_batch,
)

_DOTS = 200  # an inch
_LOOKS: dict[str, dict[str, Any]] = {
    "main": {"marker": "o", "color": "#1f4fbf", "linestyle": "-"},
    "uncompensated": {"marker": "s", "color": "#a8480a", "linestyle": "--", "markerfacecolor": "white"},
    "random": {"marker": "x", "color": "#0b7261", "linestyle": ":"},
    "dense": {"marker": "D", "color": "black", "linestyle": ""},
}


def pictures(report: Report, folder: Path) -> list[Path]:
    """Write `tradeoff.png`, `heads.png`, `kept.png`, `blocks.png` and `errors.png`, as far as there is what they show.

    Raises `UsageError` without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("pictures need matplotlib", "pip install 'optin[report]'") from error
    draw: dict[str, Callable[[Any, Report], bool]] = {
        "tradeoff": _tradeoff, "heads": _heads, "kept": _kept, "blocks": _blocks, "errors": _errors,
    }  # fmt: skip
    written = []
    for name, function in draw.items():
        figure = Figure(layout="constrained")
        if function(figure, report):
            path = folder / f"{name}.png"
            with atomic_file(path) as temporary:
                figure.savefig(temporary, format="png", dpi=_DOTS)
            written.append(path)
    return written


def _tradeoff(figure: Any, report: Report) -> bool:
    """Quality against MACs and against latency."""
    points, batch = report.points, timed_batch(report.points)
    main = next((p.evaluation["main"] for p in points if p.evaluation.get("main")), "")
    name = main or next(iter(alike(points)), "")
    if not name:
        return False
    costs: list[tuple[str, Any, int | None]] = [("MACs kept, %", share, None)]
    if batch is not None:
        costs.append((f"latency of a batch of {batch}, ms", lambda point: latency(point, batch), batch))
    figure.set_size_inches(4.2 * len(costs), 3.2)
    several_axes = np.atleast_1d(figure.subplots(1, len(costs)))
    for axes, (label, x, timed) in zip(several_axes, costs, strict=True):
        several = {one.style: one for one in series(points, x, reading(name, bool(main)), "")}
        for style in STYLES:
            if style in several:
                spots = several[style].spots
                axes.plot([s.x for s in spots], [s.y for s in spots], label=NAMES[style], **_LOOKS[style])
        if (spot := dense_spot(points, name, bool(main), timed)) is not None:
            axes.plot([spot.x], [spot.y], label="dense", **_LOOKS["dense"])
        axes.set(xlabel=label, ylabel=name.replace("_", " "))
        axes.grid(alpha=0.3)
    several_axes[0].legend()
    return True


def _heads(figure: Any, report: Report) -> bool:
    """Heads by block, shaded by the rank of their score; at the smallest budget, crosses are removed ones."""
    sites = [site for site in report.ranking.sites if site.kind == HEADS]
    if not sites:
        return False
    shades = ranks(np.concatenate([site.score for site in sites]))
    grid = np.full((len(sites), max(site.units for site in sites)), np.nan)
    start = 0
    for row, site in enumerate(sites):
        grid[row, : site.units] = shades[start : start + site.units]
        start += site.units
    figure.set_size_inches(1.5 + 0.3 * grid.shape[1], 1.2 + 0.3 * len(sites))
    axes = figure.subplots()
    image = axes.imshow(grid, cmap="Blues", vmin=0, vmax=1, aspect="equal")
    last = report.budgets[-1]
    for row, site in enumerate(sites):
        gone = sorted(set(range(site.units)) - set(last.keep[site.name]))
        axes.plot(gone, [row] * len(gone), linestyle="", marker="x", color="black", markersize=5)
    axes.set(xlabel="head", ylabel="block", title=f"crosses: removed at {last.label}")
    axes.set_yticks(range(len(sites)), [str(site.block) for site in sites])
    figure.colorbar(image, ax=axes, label="rank of the score", shrink=0.8)
    return True


def _kept(figure: Any, report: Report) -> bool:
    """The share of each site's units that every budget keeps."""
    kinds = list(dict.fromkeys(site.kind for site in report.ranking.sites))
    figure.set_size_inches(4.4 * len(kinds), 3.2)
    for axes, kind in zip(np.atleast_1d(figure.subplots(1, len(kinds))), kinds, strict=True):
        sites = [site for site in report.ranking.sites if site.kind == kind]
        for number, budget in enumerate(report.pruned):
            shares = [100 * len(budget.keep[site.name]) / max(site.units, 1) for site in sites]
            grey = str(0.65 * number / max(len(report.pruned) - 1, 1))
            axes.plot(
                range(len(sites)),
                shares,
                marker="osD^vx*+"[number % 8],
                color=grey,
                label=budget.label,
                markersize=4,
            )
        axes.set(xlabel="site, in order", ylabel="units kept, %", title=kind, ylim=(-3, 103))
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return True


def _blocks(figure: Any, report: Report) -> bool:
    """MACs and parameters of each block: of the dense model as frames, of the smallest budget filled."""
    dense, last = (
        block_costs(report.ranking, budget.kept, budget.tokens, budget.merges, report.table, budget.ranks)
        for budget in (report.budgets[0], report.budgets[-1])
    )
    parts = ["macs", "params", *(["ms"] if dense[0].ms is not None else [])]
    labels = {"macs": "MACs", "params": "parameters", "ms": "milliseconds (predicted)"}
    figure.set_size_inches(4 * len(parts), 3)
    for axes, part in zip(np.atleast_1d(figure.subplots(1, len(parts))), parts, strict=True):
        places = [cost.block for cost in dense]
        axes.bar(places, [getattr(c, part) for c in dense], fill=False, edgecolor="black", label="dense")
        axes.bar(places, [getattr(c, part) for c in last], color="#7f9fe0", label=report.budgets[-1].label)
        axes.set(xlabel="block", ylabel=labels[part])
    axes.legend(fontsize=7)
    return True


def _errors(figure: Any, report: Report) -> bool:
    """Errors by site before and after compensation, of the smallest model that has them."""
    budget = next((one for one in reversed(report.budgets) if fits(one)), None)
    if budget is None:
        return False
    rows = fits(budget)
    figure.set_size_inches(5.5, 1.2 + 0.22 * len(rows))
    axes = figure.subplots()
    for place, fit in enumerate(rows):
        axes.plot([fit.before, fit.after], [place, place], color="0.6", linewidth=1)
    axes.plot([f.before for f in rows], range(len(rows)), linestyle="", marker="s", label="before",
              color="#a8480a", markerfacecolor="white")  # fmt: skip
    axes.plot(
        [f.after for f in rows], range(len(rows)), linestyle="", marker="o", label="after", color="#1f4fbf"
    )
    axes.set_xscale("log")
    for ticker in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        ticker("{x:g}")
    axes.tick_params(axis="x", which="both", labelsize=7, rotation=45)
    axes.set_yticks(range(len(rows)), [fit.site for fit in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="error, % of the dense variance", title=budget.label)
    axes.legend()
    return True
