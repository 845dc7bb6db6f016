"""What several commands print: tables and notes for people, and the same facts for JSON."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

from optin_cli import console
from optin_cli.artefacts.exported import ExportedFile
from optin_cli.artefacts.facts import FreeMask
from optin_cli.artefacts.mask import Mask
from optin_cli.artefacts.point import Point, Sweep, over_seeds
from optin_cli.artefacts.ranking import Ranking
from optin_cli.data.lengths import describe
from optin_cli.selection.select import emptied_sites

if TYPE_CHECKING:
    from optin_cli.data.examples import Examples
    from optin_cli.measure.evaluate import Evaluation
    from optin_cli.measure.profile import Profile
    from optin_cli.pruning.apply import Applied

log = logging.getLogger("optin")

# ---- data ----


def show_reading(examples: Examples) -> None:
    """What is taken for the text, so that a misread file shows."""
    if examples.reading:
        console.note(examples.reading)


# ---- rankings ----


def ranking_facts(ranking: Ranking) -> dict[str, object]:
    """A ranking in a few numbers."""
    return {
        "digest": ranking.digest,
        "model": ranking.model,
        "data": ranking.data,
        "rows": len(ranking.row_ids),
        "method": ranking.method,
        "units": {site.name: site.units for site in ranking.sites},
        "ranks": {one.site: len(one.output) for one in ranking.rank_sites},
        "sublayers": [one.site for one in ranking.sublayers],
        "tokens": ranking.tokens,
        "lengths": ranking.data.get("lengths"),
        "macs": ranking.macs(ranking.tokens),
        "seconds": ranking.seconds,
    }


# ---- masks ----


def show_mask(mask: Mask) -> None:
    """What a mask keeps, on stderr, with a warning of the layers that it empties."""
    reached, objective = mask.reached, mask.objective
    current = mask.budget["relative_to"] == "current"
    of = "current MACs" if current else "MACs"
    dense = f"{'; dense' if current else ' of'} {console.count(reached['dense_macs'])}"
    console.note(
        f"keeps {100 * reached['flops']:.2f} % of the {of} ({console.count(reached['macs'])}{dense} at "
        f"{mask.budget['tokens']:.1f} tokens), {console.count(reached['params'])} of "
        f"{console.count(reached['dense_params'])} parameters ({reached['memory']:.1f} MiB)"
    )
    if any(mask.merges):
        console.note(
            f"merges {sum(mask.merges)} tokens: {', '.join(map(str, mask.merges))} behind the first blocks"
        )
    if mask.ranks:
        ranks = sorted(mask.ranks.values())
        console.note(
            f"cuts the heads of {len(ranks)} sites to ranks of {ranks[0]} to {ranks[-1]} "
            f"({', '.join(f'{name} {mask.summary[name]}' for name in mask.ranks)})"
        )
    if table := mask.budget["latency_table"]:
        share = 100 * reached["latency_ms"] / reached["table_latency_ms"]
        console.note(
            f"predicted latency {reached['latency_ms']:.2f} of {reached['table_latency_ms']:.2f} ms ({share:.1f} %), "
            f"batch {table['batch_size']} at size {table['size']}, {table['device']}"
        )
    moves, exchanges = exchanged(mask), objective["interactions"]
    best = "the best there is" if objective["optimal"] else "no better one was found"
    if exchanges and exchanges["moved"]:
        best = "less than it could for units one by one"
    lost = f", merging loses {100 * objective['merging']:.2f} %" if "merging" in objective else ""
    console.note(
        f"keeps {100 * objective['kept']:.2f} % of the score{lost}: {best}, at most {100 * objective['gap']:.4f} % "
        "below the bound"
    )
    if moves:
        console.note(moves)
    if "free" in objective:
        console.note(_uniformity(mask, objective["free"]))
    if (
        mask.keep
        and all(len(mask.keep[name]) == units for name, units in mask.units.items())
        and not any(mask.merges)
        and not mask.ranks
    ):
        pruned = not current and reached["macs"] < reached["dense_macs"]
        log.warning(
            "nothing is pruned: the model meets the budget as it is%s",
            " (it is pruned already; --relative-to current counts from what is left)" if pruned else "",
        )
    if emptied := emptied_sites(mask):
        log.warning(
            "emptied: %s (--min-heads, --min-neurons, --min-channels or --max-prune-per-layer keep some)",
            ", ".join(emptied),
        )


def _uniformity(mask: Mask, free: FreeMask) -> str:
    """What the same size in every layer costs."""
    whole = (
        f"; {' and '.join(free['whole'])} stay, since the model's class can't have fewer"
        if free["whole"]
        else ""
    )
    return (
        f"uniform: layers of different sizes would keep {100 * free['kept']:.2f} % of the score with "
        f"{100 * free['flops']:.2f} % of the MACs{whole}"
    )


def exchanged(mask: Mask) -> str:
    """What the interactions changed, '' if they were not asked for."""
    if not (found := mask.objective.get("interactions")):
        return ""
    before, after = found["held_out"]["before"], found["held_out"]["after"]
    change = f"{100 * (after / before - 1):+.1f} %" if before > 0 else "no change"
    if found["dropped"]:
        return (
            f"kept the units as they were: exchanges changed the joint loss of held-out examples by {change}"
        )
    if not found["moved"]:
        return "kept the units as they were: no exchange lowers their joint loss"
    return f"moved {found['moved']} units in or out for their interactions: {change} joint loss on held-out examples"


def mask_facts(mask: Mask) -> dict[str, object]:
    """A mask without its indices."""
    return {
        "digest": mask.digest,
        "budget": mask.budget,
        "reached": mask.reached,
        "objective": mask.objective,
        "kept": mask.summary,
        "merges": mask.merges,
        "ranks": mask.ranks,
        "emptied": emptied_sites(mask),
    }


# ---- pruned models ----


def show_applied(applied: Applied) -> None:
    """What became of a model, on stderr."""
    if applied.reused:
        console.note(f"{applied.path} is already this model under this mask")
        return
    if applied.fits:
        show_fits("compensation", [asdict(fit) for fit in applied.fits])
    if applied.lengths and (seen := applied.lengths["refitted"]):
        console.note(f"refitted on texts of {describe(seen)}")
    console.note(
        f"{console.count(applied.params)} of {console.count(applied.dense_params)} parameters left; sliced equals "
        f"masked to {applied.deviation:.1e} on {applied.checked_on} (allowed: {applied.tolerance:.0e})"
    )


def applied_facts(applied: Applied) -> dict[str, object]:
    """What became of a model."""
    return {
        "reused": applied.reused,
        "deviation": applied.deviation,
        "tolerance": applied.tolerance,
        "checked_on": applied.checked_on,
        "params": applied.params,
        "dense_params": applied.dense_params,
        "lengths": applied.lengths,
        "compensation": [asdict(fit) for fit in applied.fits],
    }


def show_fits(title: str, fits: Sequence[Mapping[str, Any]], *, stdout: bool = False) -> None:
    """What `optin.json` records of compensation: one line a site, its consumer and, as a mean, the units that its
    producers make."""
    columns = ("site", "error before", "after", "kept", "ridge", "units before", "after", "rows", "")
    rows = []
    for site, group in groupby(fits, key=lambda fit: fit["site"]):
        *made, consumer = group
        units = [sum(fit[when] for fit in made) / len(made) if made else None for when in ("before", "after")]
        rows.append(
            [
                site,
                _percent(consumer["before"]),
                _percent(consumer["after"]),
                consumer["method"],
                "" if consumer["ridge"] is None else f"{consumer['ridge']:.0e}",
                *map(_percent, units),
                str(consumer["rows"]),
                consumer["note"],
            ]
        )
    console.table(title, columns, rows, stdout=stdout)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f} %"


def merged(merges: list[int]) -> dict[str, int]:
    """Tokens merged behind each block, named like sites."""
    return {f"blocks.{block}.tokens merged": count for block, count in enumerate(merges) if any(merges)}


def ranked(ranks: Mapping[str, int]) -> dict[str, int]:
    """Ranks of the heads of sites, named like sites."""
    return {f"{name} rank": rank for name, rank in ranks.items()}


def show_sizes(sizes: dict[str, int], of: dict[str, int] | None = None) -> None:
    """One line a block, one column a kind of unit."""
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in sizes))
    blocks = list(dict.fromkeys(name.rpartition(".")[0] for name in sizes))
    rows = []
    for block in blocks:
        cells = [block]
        for kind in kinds:
            name = f"{block}.{kind}"
            total = f"/{of[name]}" if of and name in of else ""
            cells.append(f"{sizes[name]}{total}" if name in sizes else "")
        rows.append(cells)
    console.table("", ["block", *kinds], rows, stdout=True)


# ---- sweeps ----


def point_facts(sweep: Sweep, point: Point) -> dict[str, object]:
    """A point, with the directory of its model."""
    return {"directory": str(sweep.directory(point)), **asdict(point)}


def point_line(point: Point) -> str:
    """`flops-0.6: 60.0 % of the MACs, accuracy 87.9 (-0.30), 1.43x at batch 32`."""
    parts = [f"{100 * point.share:.1f} % of the MACs"]
    if quality := point.quality:
        lost = point.evaluation["main"] and f" (dense {point.evaluation['baseline_metrics'][quality[0]]:.2f})"
        parts.append(f"{quality[0].replace('_', ' ')} {quality[1]:.2f}{lost or ''}")
    parts += [f"{one['speedup']:.2f}x at batch {one['batch_size']}" for one in point.timings]
    return f"{point.name}: {', '.join(parts)}"


def show_points(points: Sequence[Point], *, stdout: bool = False) -> None:
    """One line a point, on stderr unless it is the data itself; then the means over seeds, where there are several."""
    batches = sorted({one["batch_size"] for point in points for one in point.timings})
    names = list(dict.fromkeys(quality[0] for point in points if (quality := point.quality)))
    columns = ["model", "MACs", "params", *(name.replace("_", " ") for name in names), "drop"]
    columns += [f"speed-up at {batch}" for batch in batches]
    rows = []
    for point in points:
        cells = [point.name, f"{100 * point.share:.1f} %", console.count(point.params)]
        found = dict([point.quality] if point.quality else [])
        cells += [f"{found[name]:.2f}" if name in found else "" for name in names]
        cells.append("" if point.drop is None else f"{point.drop:.2f}")
        for batch in batches:
            timing = point.timing(batch)
            cells.append(
                f"{timing['speedup']:.2f}x ({timing['interval'][0]:.2f}..{timing['interval'][1]:.2f})"
                if timing
                else ""
            )
        rows.append(cells)
    console.table("", columns, rows, stdout=stdout)
    spread = [group for group in over_seeds(points) if group.seeds > 1]
    if spread:
        rows = [[one.name, str(one.seeds), f"{one.drop:.2f}", f"{one.deviation:.2f}"] for one in spread]
        console.table(
            "over seeds", ["budget", "seeds", "mean drop", "standard deviation"], rows, stdout=stdout
        )


# ---- measurements ----


def show_timings(rows: list[dict[str, Any]]) -> None:
    """One line a model and setting, on stdout; remarks on stderr."""
    first = rows[0]
    where = first["device"] + (
        f", {console.plural(first['threads'], 'thread')}" if first["device"] == "cpu" else ""
    )
    foretold = any("predicted_ms" in row for row in rows)
    mixed = len({(row["execution"], row["dtype"]) for row in rows}) > 1  # exported files beside torch
    columns = ["model", "batch", "size", "median ms", "p10..p90"]
    columns += ["predicted ms"] if foretold else []
    columns += ["per s", "MACs", "params", "disk", "peak mem", "speed-up", "95 % interval", "of ideal"]
    columns += ["run by"] if mixed else []
    table = []
    for row in rows:
        predicted = f"{row['predicted_ms']:.2f}" if "predicted_ms" in row else ""
        table.append(
            [
                row["model"],
                str(row["setting"]["batch_size"]),
                str(row["setting"]["size"]),
                f"{row['median_ms']:.2f}",
                f"{row['p10_ms']:.2f}..{row['p90_ms']:.2f}",
                *([predicted] if foretold else []),
                f"{row['throughput']:.0f}",
                console.count(row["macs"]),
                console.count(row["params"]),
                console.size(row["disk_bytes"]) if row["disk_bytes"] else "",
                "" if row["peak_memory"] is None else console.size(row["peak_memory"]),
                f"{row['speedup']:.2f}x" if "speedup" in row else "",
                "{:.2f}..{:.2f}".format(*row["speedup_interval"]) if "speedup_interval" in row else "",
                f"{100 * row['efficiency']:.0f} %" if "efficiency" in row else "",
                *([_run_by(row)] if mixed else []),
            ]
        )
    how = "" if first["execution"] == "eager" else f", {first['execution']}"
    console.table(where if mixed else f"{where}, {first['dtype']}{how}", columns, table, keys=3, stdout=True)
    for row in rows:
        if "predicted_speedup" in row:
            console.note(
                f"{row['model']}: predicted {row['predicted_speedup']:.2f}x, measured {row['speedup']:.2f}x "
                f"at batch {row['setting']['batch_size']}, size {row['setting']['size']}"
            )
    for setting, point in dict.fromkeys((row["setting"]["batch_size"], row["point"]) for row in rows):
        if point:
            console.note(f"{point}: batch {setting}")
    for name in dict.fromkeys(row["model"] for row in rows):
        facts = next(row for row in rows if row["model"] == name)
        parts = [f"attention {facts['attention']}"] if facts["attention"] else []
        if facts["load_ms"] is not None:
            parts.append(f"opens in {facts['load_ms']:.0f} ms, first forward {facts['first_ms']:.0f} ms")
        if facts["joules"] is not None:
            parts.append(f"{facts['joules']:.3g} J an example at batch {facts['setting']['batch_size']}")
        if parts:
            console.note(f"{name}: {'; '.join(parts)}")
    idle = sorted({row["setting"]["batch_size"] for row in rows if not row["saturated"]})
    if idle:
        console.note(
            f"not saturated at batch {', '.join(map(str, idle))}: twice the batch takes less than 1.5 times as long, "
            "so a smaller model can't show its full speed there"
        )


_FAR_FROM_IDEAL = 0.75


def advise_latency(rows: list[dict[str, Any]]) -> None:
    """Where the speed-up is far from what the MACs promise, say how to budget time instead, on stderr."""
    full = [row for row in rows if row["saturated"] and "efficiency" in row]
    far = [row for row in full if row["efficiency"] < _FAR_FROM_IDEAL]
    if not far:
        return
    worst = min(far, key=lambda row: row["efficiency"])
    batch = worst["setting"]["batch_size"]
    table = f"optin bench {rows[0]['model']} --table t.json --batch-size {batch}"
    console.note(
        f"{worst['model']} has {100 * worst['efficiency']:.0f} % of the speed-up that its MACs promise at batch "
        f"{batch}: a latency table budgets measured time instead (`{table}`, then "
        "`optin select RANKING --latency 0.5 --latency-table t.json`)"
    )


def _run_by(row: dict[str, Any]) -> str:
    """`torch, float32`, `onnxruntime 1.32.0, int8`."""
    torch_runs = {"eager": "torch", "compile": "torch.compile"}
    return f"{torch_runs.get(row['execution'], row['execution'])}, {row['dtype']}"


def show_generation(rows: list[dict[str, Any]]) -> None:
    """Reading and writing apart: one line a model and batch size, on stdout."""
    columns = [
        "model",
        "batch",
        "prefill ms",
        "tokens/s",
        "speed-up",
        "decode ms/token",
        "tokens/s",
        "speed-up",
    ]
    table = []
    for row in rows:
        cells = [row["model"], str(row["batch_size"])]
        for part in ("prefill", "decode"):
            speedup = f"{row[f'{part}_speedup']:.2f}x" if f"{part}_speedup" in row else ""
            cells += [f"{row[f'{part}_ms']:.2f}", f"{row[f'{part}_tokens_per_second']:.0f}", speedup]
        table.append(cells)
    first = rows[0]
    console.table(f"{first['new']} tokens after {first['prompt']}", columns, table, keys=2, stdout=True)


def show_profile(found: Profile) -> None:
    """Where the time of a forward goes, on stdout: a row a site, the others together, and all of it."""
    both = len(found.models) > 1
    columns = ["site", "units", "dense ms", "pruned ms", "speed-up"] if both else ["site", "units", "ms"]
    columns.append("of all")

    def row(name: str, units: str, times: Sequence[float]) -> list[str]:
        cells = [name, units, *(f"{value:.3f}" for value in times)]
        if both:
            cells.append(f"{times[0] / times[1]:.2f}x" if times[1] > 0 else "")
        return [*cells, f"{100 * times[-1] / found.total_ms[-1]:.1f} %"]

    rows = [row(site.site, " -> ".join(map(str, site.units)), site.ms) for site in found.sites]
    kinds = dict.fromkeys(site.kind for site in found.sites)
    for kind in kinds:
        some = [site.ms for site in found.sites if site.kind == kind]
        rows.append(row(f"all {kind}", "", [sum(times) for times in zip(*some, strict=True)]))
    rows.append(row("elsewhere", "", found.elsewhere_ms))
    rows.append(row("all", "", found.total_ms))
    title = f"{found.device}, batch {found.batch_size}, size {found.size}: {' against '.join(found.models)}"
    console.table(title, columns, rows, stdout=True)


_SHOWN = {"top1": "top-1", "top5": "top-5"}


def show_evaluation(evaluation: Evaluation, data: str, split: str) -> None:
    """Metrics and fidelity, on stdout."""
    both = bool(evaluation.baseline_metrics)
    columns = ["metric", *(["dense"] if both else []), "model", *(["difference"] if both else [])]
    rows = []
    for name, value in evaluation.metrics.items():
        dense = evaluation.baseline_metrics.get(name)
        shown = _SHOWN.get(name, name)
        form = ".4g" if name == "mse" else ".2f"  # in units of the label, which may be small
        cells = [shown, f"{value:{form}}"]
        if dense is not None:
            cells = [shown, f"{dense:{form}}", f"{value:{form}}", f"{value - dense:+{form}}"]
        rows.append(cells)
    title = f"{evaluation.task} on {evaluation.examples} examples of {data} ({split})"
    if rows:
        console.table(title, columns, rows, stdout=True)
    if evaluation.fidelity:
        console.table(
            title if not rows else "against the dense model",
            ["fidelity", ""],
            [[name.replace("_", " "), f"{value:.4g}"] for name, value in evaluation.fidelity.items()],
            stdout=True,
        )
    for warning in filter(None, (evaluation.beyond, evaluation.unlike)):
        log.warning("%s", warning)


# ---- exported files ----


def deviation_words(facts: ExportedFile) -> str:
    """`2.9e-06 (allowed: 6e-03), on builtin:prose, inputs of 8 x 45 and 3 x 13`."""
    sizes = " and ".join(" x ".join(map(str, shape)) for shape in facts["shapes"])
    allowed = f" (allowed: {facts['tolerance']:.0e})" if "tolerance" in facts else ""
    return f"{facts['deviation']:.1e}{allowed}, on {facts['checked_on']}, inputs of {sizes}"


def agreement_words(facts: ExportedFile) -> str:
    """`cosine 0.9971`: of int8, beside float32."""
    return ", ".join(f"{name} {value:.4g}" for name, value in facts["agreement"].items())


def exported_facts(facts: ExportedFile) -> list[list[str]]:
    """What a record says of a file."""
    found = [
        ["inputs", ", ".join(facts["inputs"])],
        ["outputs", ", ".join(facts["outputs"])],
        ["from torch", deviation_words(facts)],
    ]
    if "agreement" in facts:
        found.append(["from float32", f"{agreement_words(facts)} on {facts['examples']} examples"])
    if left := facts.get("float_layers"):
        found.append(["in float32", f"{', '.join(left)} (for --max-error {facts['max_error']:g})"])
    return [*found, ["versions", ", ".join(f"{name} {one}" for name, one in facts["versions"].items())]]
