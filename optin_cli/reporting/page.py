"""The report as one HTML page that needs nothing else: no network, no fonts, its charts drawn as SVG."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray

from optin_cli.artefacts.point import TimedPoint, over_seeds
from optin_cli.artefacts.ranking import RankedSite, Ranking
from optin_cli.console import count, duration
from optin_cli.reporting.charts import log_range, marker, profile, ranks
from optin_cli.reporting.collect import Budget, Report
from optin_cli.reporting.commands import commands
from optin_cli.reporting.costs import BlockCost, block_costs
from optin_cli.reporting.tradeoff import charts, timed_batch

HEADS = "heads"
CELL, GAP = 22, 2
"""Of the heat map, in pixels."""


@dataclass(frozen=True)
class Cell:
    """A head in the heat map."""

    rank: float
    """Of its score among all heads, from 0 to 1."""
    title: str


@dataclass(frozen=True)
class HeatRow:
    """The heads of one site."""

    site: str
    label: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Profile:
    """The sorted scores of a site's neurons or channels."""

    site: str
    label: str
    units: int
    path: str


@dataclass(frozen=True)
class Fit:
    """The error at a site before and after compensation, as shares in per cent and as places on a logarithmic axis."""

    site: str
    before: float
    after: float
    from_x: float
    to_x: float
    method: str


def page(report: Report) -> str:
    """The page, as text."""
    template = _environment().get_template("page.html.j2")
    found = [_costs(report, budget) for budget in report.budgets]
    dense, heat = found[0], heat_rows(report.ranking)
    heads = [row.site for row in heat]
    return template.render(
        title=f"{report.ranking.model['id']}: optin report",
        report=report,
        model=report.ranking.model,
        summary=summary(report),
        charts=charts(report.points),
        table=point_table(report),
        seeds=[group for group in over_seeds(report.points) if group.seeds > 1],
        start=min(len(report.budgets) - 1, 1),
        heat=heat,
        profiles=profiles(report.ranking),
        blocks=dense,
        timed=any(cost.ms is not None for cost in dense),
        latency_label=_latency_label(report),
        fits=[(number, budget.label, fits(budget)) for number, budget in enumerate(report.budgets) if budget.fits],
        facts=facts(report),
        commands=commands(report),
        budgets=_script_data([_position(b, c, dense, heads) for b, c in zip(report.budgets, found, strict=True)]),
        cell=CELL,
        gap=GAP,
        marker=marker,
        count=count,
    )  # fmt: skip


@cache
def _environment() -> Environment:
    loader = PackageLoader("optin_cli.reporting", "templates")
    return Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _script_data(content: Any) -> str:
    """JSON that may stand within a script element, whatever names it holds."""
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")


# ---- what is at the top ----


def summary(report: Report) -> str:
    """The sentence below the title."""
    ranking = report.ranking
    units = ", ".join(
        f"{sum(s.units for s in ranking.sites if s.kind == kind):,} {kind}" for kind in _kinds(ranking)
    )
    data = ranking.data
    return (
        f"{units} in {len({site.block for site in ranking.sites})} blocks, ranked by {ranking.method} on "
        f"{len(ranking.row_ids)} examples of {data['spec']} ({data['split']})."
    )


def _kinds(ranking: Ranking) -> list[str]:
    return list(dict.fromkeys(site.kind for site in ranking.sites))


def point_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Columns, and a row for each point."""
    points = report.points
    mains = list(dict.fromkeys(p.evaluation["main"] for p in points if p.evaluation.get("main")))
    alike = list(dict.fromkeys(name for p in points for name in p.evaluation.get("fidelity", {})))
    batches = sorted({timing["batch_size"] for p in points for timing in p.timings})
    columns = ["model", "MACs", "parameters", *mains, *(name.replace("_", " ") for name in alike), "drop"]
    columns += [f"{what}, batch {batch}" for batch in batches for what in ("ms", "speed-up")]
    rows = []
    for point in points:
        cells = [point.name, f"{100 * point.share:.1f} %", count(point.params)]
        cells += [_number(point.evaluation.get("metrics", {}).get(name)) for name in mains]
        cells += [_number(point.evaluation.get("fidelity", {}).get(name), "4g") for name in alike]
        cells.append(_number(point.drop))
        for batch in batches:
            timing = point.timing(batch)
            cells += [_number(timing["ms"]), _speedup(timing)] if timing else ["", ""]
        rows.append(cells)
    return columns, rows


def _speedup(timing: TimedPoint) -> str:
    low, high = timing["interval"]
    return f"{timing['speedup']:.2f}× ({low:.2f} to {high:.2f})"


def _number(value: float | None, form: str = "2f") -> str:
    return "" if value is None else f"{value:.{form}}"


# ---- what each budget keeps ----


def heat_rows(ranking: Ranking) -> list[HeatRow]:
    """A row for each site of heads, shaded by the rank of the score among all heads."""
    sites = [site for site in ranking.sites if site.kind == HEADS]
    if not sites:
        return []
    scores = np.concatenate([site.score for site in sites])
    shades = ranks(scores)
    rows, start = [], 0
    for site in sites:
        here = shades[start : start + site.units]
        start += site.units
        cells = tuple(
            Cell(float(here[head]), _head_title(site, head, here, len(scores))) for head in range(site.units)
        )
        rows.append(HeatRow(site.name, _short(site), cells))
    return rows


def _head_title(site: RankedSite, head: int, shades: NDArray[np.float64], total: int) -> str:
    place = total - round(float(shades[head]) * (total - 1))
    return f"{site.name}, head {head}: score {site.score[head]:.3g}, place {place} of {total}"


def _short(site: RankedSite) -> str:
    """`3` of `blocks.3.heads`, `3 cross` of `blocks.3.cross`."""
    label = site.name.rpartition(".")[2]
    return str(site.block) if label == site.kind else f"{site.block} {label}"


def profiles(ranking: Ranking) -> list[Profile]:
    """The sorted scores of every site of neurons and channels, all on one logarithmic axis."""
    sites = [site for site in ranking.sites if site.kind != HEADS]
    low, high = log_range([site.score for site in sites])
    return [
        Profile(site.name, f"block {_short(site)}", site.units, profile(site.score, low, high))
        for site in sites
    ]


def _costs(report: Report, budget: Budget) -> list[BlockCost]:
    return block_costs(report.ranking, budget.kept, budget.tokens, budget.merges, report.table, budget.ranks)


def _position(
    budget: Budget, costs: list[BlockCost], dense: list[BlockCost], heads: list[str]
) -> dict[str, Any]:
    """What the script shows at one position of the slider; `heads` are the sites of the heat map."""
    return {
        "label": budget.label,
        "note": note(budget),
        "heads": {name: budget.keep[name] for name in heads},
        "kept": budget.kept,
        "blocks": [
            [_bar(cost.macs, whole.macs, "MACs"), _bar(cost.params, whole.params, "parameters")]
            + ([_bar(cost.ms, whole.ms or 0.0, "ms")] if cost.ms is not None else [])
            for cost, whole in zip(costs, dense, strict=True)
        ],
    }  # fmt: skip


def _bar(value: float, whole: float, unit: str) -> list[Any]:
    """[share of the whole in per cent, text]"""
    share = 100 * value / whole if whole else 0.0
    shown = f"{value:.2f}" if unit == "ms" else count(value)
    return [round(share, 1), f"{shown} ({share:.0f} %)"]


def note(budget: Budget) -> str:
    """The line below the slider: what the budget comes to."""
    reached = budget.reached
    if reached is None:
        return "Nothing is pruned."
    parts = [f"{100 * reached['macs'] / reached['dense_macs']:.1f} % of the MACs of the blocks"]
    parts.append(f"{count(reached['params'])} of {count(reached['dense_params'])} parameters")
    if budget.score is not None:
        parts.append(f"{100 * budget.score:.1f} % of the score")
    if any(budget.merges):
        parts.append(f"{sum(budget.merges)} tokens merged")
    if budget.point is not None and (quality := budget.point.quality):
        dense = budget.point.evaluation["baseline_metrics"].get(quality[0])
        beside = "" if dense is None else f" (dense {dense:.2f})"
        parts.append(f"{quality[0].replace('_', ' ')} {quality[1]:.2f}{beside}")
        batch = timed_batch([budget.point])
        if batch is not None and (timing := budget.point.timing(batch)):
            parts.append(f"{timing['speedup']:.2f}× as fast at batch {batch}")
    return "Keeps " + ", ".join(parts) + "."


def fits(budget: Budget) -> list[Fit]:
    """The error of each site's consumer before and after compensation, on one logarithmic axis of 0 to 100."""
    consumers = {fit["site"]: fit for fit in budget.fits}  # the last of a site is its consumer
    values = [fit[when] for fit in consumers.values() for when in ("before", "after") if fit[when] > 0]
    if not values:
        return []
    high = np.log10(max(values))
    low = min(max(np.log10(min(values)), high - 5), high - 1)

    def place(value: float) -> float:
        return round(float(100 * (np.log10(max(value, 10**low)) - low) / (high - low)), 1)

    return [
        Fit(name, 100 * f["before"], 100 * f["after"], place(f["before"]), place(f["after"]), f["method"])
        for name, f in consumers.items()
    ]


def _latency_label(report: Report) -> str:
    if report.table is None:
        return ""
    setting = report.table.setting
    return (
        f"batch {setting['batch_size']} at size {setting['size']} on {setting['device']}, {setting['dtype']}"
    )


# ---- where it came from ----


def facts(report: Report) -> list[tuple[str, str]]:
    """Names and values of the provenance."""
    ranking = report.ranking
    versions = ", ".join(f"{name} {version}" for name, version in ranking.versions.items())
    made = f"{ranking.created} in {duration(ranking.seconds)} on {ranking.device}, {ranking.dtype}"
    found = [
        ("model", f"{ranking.model['id']} ({ranking.model['class']}, {ranking.model['task']})"),
        ("weights", ranking.model["digest"][:16]),
        ("parameters", f"{ranking.dense['params']:,}"),
        ("calibration", f"{ranking.data['spec']} ({ranking.data['split']}), {len(ranking.row_ids)} rows"),
        ("mean tokens", f"{ranking.tokens:.1f}"),
        ("method", ranking.method),
        ("ranking", f"{report.path} ({ranking.digest[:16]})"),
        ("made", made),
        ("versions", versions),
    ]
    evaluation = next((p.evaluation["data"] for p in report.points if p.evaluation), None)
    if evaluation:
        measured = f"{evaluation['spec']} ({evaluation['split']}), {evaluation['examples']} examples"
        found.insert(6, ("evaluation", measured))
    timing = next((timing for point in report.points for timing in point.timings), None)
    if timing:
        threads = f", {timing['threads']} threads" if timing["device"] == "cpu" else ""
        found.insert(-3, ("timing", f"{timing['device']}{threads}, {timing['dtype']}, size {timing['size']}"))
    return found
