"""What the parts found, as Markdown: aims and what was reached, then the latencies."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Facts = Mapping[str, Any]
NOT_MEASURED = "not measured"


def read(out: Path, parts: Iterable[str]) -> dict[str, Facts]:
    """Part -> its facts; empty for one that wrote none."""
    files = {part: out / f"{part}.json" for part in parts}
    return {part: json.loads(file.read_text()) if file.is_file() else {} for part, file in files.items()}


def report(found: Mapping[str, Facts]) -> str:
    card = found["card"]
    where = (
        f"{card.get('name', 'unknown card')}, driver {card.get('driver') or 'none'}, torch {card.get('torch')}, "
        f"transformers {card.get('transformers')}, Python {card.get('python')}"
    )
    rates = ", ".join(f"{name} {rate}" for name, rate in card.get("tflops", {}).items())
    lines = [
        f"{where}.",
        "",
        f"Matrix rates in TFLOP/s (8192 x 8192): {rates}; copies {card.get('copy_gb_s')} GB/s.",
        "",
    ]
    lines += table(["what", "aim", "reached"], [[what, aim, told(reach, found)] for what, aim, reach in AIMS])
    rows = [*found["bench"].get("rows", []), *found["ranks"].get("rows", [])]
    for shape in dict.fromkeys(row["shape"] for row in rows):
        lines += ["", f"### {shape}", "", *latencies([row for row in rows if row["shape"] == shape])]
    broken = [
        f"- {part}, {step}: {why}"
        for part, facts in found.items()
        for step, why in facts.get("failed", {}).items()
    ]
    broken += [f"- {part}: {facts['stopped']}" for part, facts in found.items() if "stopped" in facts]
    failed = [
        name for name, outcome in found["tests"].get("outcomes", {}).items() if outcome in ("failed", "error")
    ]
    broken += [f"- test {name}" for name in failed]
    if broken:
        lines += ["", "What failed:", "", *broken]
    return "\n".join(lines) + "\n"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(r) + " |" for r in rows),
    ]


def told(reach: Callable[[Mapping[str, Facts]], str], found: Mapping[str, Facts]) -> str:
    """What was reached; a part that did not come so far has no such facts."""
    try:
        return reach(found)
    except (KeyError, ValueError, IndexError):
        return NOT_MEASURED


def latencies(rows: Sequence[Facts]) -> list[str]:
    """A line for each precision, way to run and batch: milliseconds of the dense model, speed-ups of the others."""
    names = list(dict.fromkeys(row["model"] for row in rows if row["model"] != "dense"))
    settings = list(dict.fromkeys((row["precision"], row["execution"], row["batch"]) for row in rows))
    lines = []
    for setting in settings:
        here = {r["model"]: r for r in rows if (r["precision"], r["execution"], r["batch"]) == setting}
        dense = here["dense"]
        cells = [
            f"{here[n]['speedup']:.2f}x ({100 * here[n]['of_ideal']:.0f} %)" if n in here else ""
            for n in names
        ]
        batch = f"{setting[2]} (knee)" if dense.get("knee") else str(setting[2])
        lines.append([setting[0], setting[1], batch, f"{dense['ms']:.3f}", f"{dense['tflops']:.0f}", *cells])
    columns = ["precision", "run", "batch", "dense ms", "TFLOP/s", *(f"{name} (of ideal)" for name in names)]
    return table(columns, lines)


# ---- what was reached ----


def _tests(found: Mapping[str, Facts]) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in found["tests"]["counts"].items())


def _at_knee(found: Mapping[str, Facts]) -> str:
    rows = [r for r in found["bench"]["rows"] if r.get("knee") and r["model"].endswith("auto")]
    parts = []
    for shape, precision in dict.fromkeys((r["shape"], r["precision"]) for r in rows):
        shares = [r["of_ideal"] for r in rows if (r["shape"], r["precision"]) == (shape, precision)]
        parts.append(f"{shape} {precision} {min(shares):.2f} to {max(shares):.2f}")
    return "; ".join(parts) or NOT_MEASURED


def _never_slower(found: Mapping[str, Facts]) -> str:
    rows = [r for r in found["bench"]["rows"] if r["model"].endswith("auto")]
    worst = min(rows, key=lambda r: r["speedup"])
    return (
        f"{worst['speedup']:.2f}x at worst ({worst['shape']} {worst['model']}, {worst['precision']}, "
        f"{worst['execution']}, batch {worst['batch']}), of {len(rows)} settings"
    )


def _graphs(found: Mapping[str, Facts]) -> str:
    rows = [
        r for r in found["bench"]["rows"]
        if r["batch"] == 1 and "cuda graph" in r["execution"] and r["model"] == "0.5 round auto"
    ]  # fmt: skip
    return "; ".join(
        f"{r['shape']} {r['precision']} {r['execution']}: {r['speedup']:.2f}x" for r in rows
    ) or NOT_MEASURED  # fmt: skip


def _scored(name: str, rate: str) -> Callable[[Mapping[str, Facts]], str]:
    def reach(found: Mapping[str, Facts]) -> str:
        facts = found["scoring"][name]
        share = facts["tflops"] / found["card"]["tflops"][rate]
        if "seconds" in facts:
            time = f"{facts['seconds']:.1f} s"
        else:
            time = f"{facts['seconds_by_proportion']:.0f} s by proportion, from {facts['timed_seconds']:.1f} s timed"
        return f"{time}; {facts['tflops']:.0f} TFLOP/s, {100 * share:.0f} % of the {rate} rate"

    return reach


def _applied(found: Mapping[str, Facts]) -> str:
    facts = found["scoring"]["apply"]
    return (
        f"{facts['seconds']:.1f} s on {facts['sequences']} sequences; sliced equals masked to {facts['deviation']:.1e} "
        f"(allowed: {facts['tolerance']:.0e})"
    )


def _team(found: Mapping[str, Facts]) -> str:
    facts = found["team"]
    return (
        f"scores of {facts['processes']} processes differ by {facts['largest_difference']:.0e}; NCCL ran with "
        f"{facts['nccl_processes']}"
    )


def _spread(found: Mapping[str, Facts]) -> str:
    return f"scores differ by {found['team']['device_map_largest_difference']:.0e}"


def _decoder(found: Mapping[str, Facts]) -> str:
    facts = found["decoder"]
    return (
        f"{facts['params'] / 1e9:.2f} B parameters: score {facts['score_seconds']} s, "
        f"apply {facts['apply_seconds']} s; "
        f"peaks {facts.get('score_peak_gib', 0)} and {facts.get('apply_peak_gib', 0)} GiB"
    )


def _speed(found: Mapping[str, Facts]) -> str:
    dense, small = (found["decoder"]["speed"][name] for name in ("dense", "0.7"))
    return "; ".join(
        f"{batch}: reads {dense[batch]['read']:,} -> {small[batch]['read']:,}, writes {dense[batch]['write']:,} -> "
        f"{small[batch]['write']:,}"
        for batch in dense
    )


def _ranks(found: Mapping[str, Facts]) -> str:
    return ", ".join(f"{kind} {value:.4f}" for kind, value in found["half"]["rank_agreement"].items())


def _half_apply(found: Mapping[str, Facts]) -> str:
    facts = found["half"]
    after, output = facts["error_after"], facts["output_error"]
    return (
        f"mean error of a site {facts['error_before']:.1e} -> {after['float32']:.1e} (float32), "
        f"{after['bfloat16']:.1e} (bfloat16); error of the output {output['float32']:.3f} and "
        f"{output['bfloat16']:.3f}; in bfloat16 sliced equals masked to "
        f"{facts['apply_bfloat16']['deviation']:.1e} (allowed: {facts['apply_bfloat16']['tolerance']:.0e})"
    )


def _lower_ranks(found: Mapping[str, Facts]) -> str:
    """Every number of dimensions by whole heads and by ranks: how much longer the latter take."""
    parts = []
    settings = dict.fromkeys((r["shape"], r["precision"], r["batch"]) for r in found["ranks"]["rows"])
    for setting in settings:
        times = {
            tuple(map(int, r["model"].split(" x "))): r["ms"]
            for r in found["ranks"]["rows"]
            if (r["shape"], r["precision"], r["batch"]) == setting and " x " in r["model"]
        }
        width = max(rank for _, rank in times)
        whole = {heads * rank: ms for (heads, rank), ms in times.items() if rank == width}
        more = [ms / whole[h * r] - 1 for (h, r), ms in times.items() if r < width and h * r in whole]
        parts.append(
            f"{setting[0].partition(',')[0]} {setting[1]} batch {setting[2]} {100 * max(more):+.0f} %"
        )
    return "; ".join(parts) or NOT_MEASURED


AIMS: tuple[tuple[str, str, Callable[[Mapping[str, Facts]], str]], ...] = (
    ("`pytest -m cuda`", "all pass", _tests),
    ("share of the ideal speed-up at the knee, `--round-to auto`", "0.9", _at_knee),
    ("`--round-to auto` against dense", "never slower", _never_slower),
    ("0.5 at batch 1 with CUDA graphs, `--round-to auto`", "above 1.3x", _graphs),
    ("BERT-base, curvature, 8 probes", "under 5 s", _scored("curvature_8", "tf32")),
    ("BERT-base, curvature, 2 probes", "", _scored("curvature_2", "tf32")),
    ("BERT-base, ablation, `--precision reduced`", "under 60 s", _scored("ablation_reduced", "tf32")),
    ("BERT-base, ablation", "", _scored("ablation_full", "float32")),
    ("BERT-base, mixed", "", lambda found: f"{found['scoring']['mixed']['seconds']:.1f} s"),
    ("BERT-base, `apply` with compensation", "under 20 s", _applied),
    ("attention of as many dimensions by lower ranks, against whole heads", "", _lower_ranks),
    ("several processes", "same scores", _team),
    ("`--device-map auto`", "same scores", _spread),
    ("Llama in bfloat16: score and apply", "under 3 min, 40 GB", _decoder),
    ("its tokens a second, dense -> 0.7", "", _speed),
    ("bfloat16 against float32: ranks of scores", "above 0.99", _ranks),
    ("bfloat16 against float32: compensation", "", _half_apply),
)
