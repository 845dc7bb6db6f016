"""`optin bench`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optin_cli import console
from optin_cli.commands import options

if TYPE_CHECKING:
    from optin_cli.measure.latency import Timing
    from optin_cli.models.checkpoint import OpenModel


def bench(
    model: options.Model,
    baseline: Annotated[
        str | None, typer.Option("--baseline", metavar="MODEL", help="Dense model to compare with.")
    ] = None,
    batch_size: Annotated[str, typer.Option("--batch-size", help="Batch sizes, e.g. 1,32.")] = "1,32",
    seq_len: Annotated[
        str | None, typer.Option("--seq-len", help="Sequence lengths, e.g. 64,128 (text models).")
    ] = None,
    image_size: Annotated[
        str | None, typer.Option("--image-size", help="Image sides in pixels (vision models).")
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", help="Forwards of each model, at least.")] = 10,
    seconds: Annotated[float, typer.Option("--seconds", help="Time spent on each setting.")] = 5.0,
    task: options.Task = None,
    anatomy: options.Anatomy = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Measure latency, throughput, memory and MACs, dense and pruned interleaved in one process.

    Examples:

      optin bench m-60/ --baseline demo:minilm

      optin bench m-60/ --baseline demo:minilm --batch-size 1,8,32 --seq-len 64,128 --json
    """
    from optin_cli.errors import UsageError
    from optin_cli.measure import latency

    opened = options.open_with(model, task, anatomy, device, dtype)
    wrong = image_size if opened.family.modality == "text" else seq_len
    if wrong is not None:
        raise UsageError(
            f"{model} reads {opened.family.modality}s",
            "use --seq-len" if opened.family.modality == "text" else "use --image-size",
        )
    asked = seq_len or image_size
    sizes = options.whole_numbers(asked, "--seq-len or --image-size") if asked else None
    models = [opened]
    if baseline:
        models.insert(0, options.open_with(baseline, task, anatomy, device, str(opened.dtype)[6:]))
    with console.progress(not json) as on_progress:
        timings = latency.bench(
            models,
            options.whole_numbers(batch_size, "--batch-size"),
            sizes,
            repeats=repeats,
            seconds=seconds,
            seed=seed,
            on_progress=on_progress,
        )
    rows = compare(models, timings)
    if json:
        console.emit_json({"timings": rows})
    else:
        show(rows)


def compare(models: list[OpenModel], timings: list[Timing]) -> list[dict[str, Any]]:
    """Timings as plain data, the pruned ones with their speed-up over the dense one of the same setting."""
    from optin_cli.measure import latency
    from optin_cli.measure.memory import disk_bytes

    rows = []
    for index, timing in enumerate(timings):
        which = models[index % len(models)]
        row = {**asdict(timing), "disk_bytes": disk_bytes(which)}
        if which is not models[0]:
            dense = timings[index - index % len(models)]
            ideal = latency.ideal_speedup(models[0], which, timing.setting.size)
            row["speedup"] = latency.speedup(dense, timing)
            row["ideal_speedup"] = ideal
            row["efficiency"] = latency.efficiency(row["speedup"], ideal)
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """One line a model and setting, on stderr."""
    first = rows[0]
    where = first["device"] + (f", {first['threads']} threads" if first["device"] == "cpu" else "")
    columns = [
        "model",
        "batch",
        "size",
        "median ms",
        "p10..p90",
        "per s",
        "MACs",
        "params",
        "disk",
        "peak mem",
    ]
    columns += ["speed-up", "of ideal"]
    table = []
    for row in rows:
        table.append(
            [
                row["model"],
                str(row["setting"]["batch_size"]),
                str(row["setting"]["size"]),
                f"{row['median_ms']:.2f}",
                f"{row['p10_ms']:.2f}..{row['p90_ms']:.2f}",
                f"{row['throughput']:.0f}",
                console.count(row["macs"]),
                console.count(row["params"]),
                console.size(row["disk_bytes"]) if row["disk_bytes"] else "",
                console.size(row["peak_memory"]),
                f"{row['speedup']:.2f}x" if "speedup" in row else "",
                f"{100 * row['efficiency']:.0f} %" if "efficiency" in row else "",
            ]
        )
    console.table(f"{where}, {first['dtype']}", columns, table)
    idle = sorted({row["setting"]["batch_size"] for row in rows if not row["saturated"]})
    if idle:
        console.note(
            f"not saturated at batch {', '.join(map(str, idle))}: twice the batch takes less than 1.5 times as long, "
            "so a smaller model can't show its full speed there"
        )
