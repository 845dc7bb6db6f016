"""`optin eval`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from optin_cli import console
from optin_cli.commands import options
from optin_cli.errors import UsageError

if TYPE_CHECKING:
    from optin_cli.measure.evaluate import Evaluation


def evaluate(
    model: options.Model,
    data: options.Data,
    baseline: Annotated[
        str | None, typer.Option("--baseline", metavar="MODEL", help="Dense model to compare with.")
    ] = None,
    split: options.Split = "validation",
    samples: Annotated[
        int | None, typer.Option("--samples", help="Examples drawn by seed (default: all).")
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            "--max-drop",
            help="Exit with 5 if more points than this are lost to the baseline, or perplexity rises by more per cent.",
        ),
    ] = None,
    batch_size: options.BatchSize = 32,
    max_length: options.MaxLength = None,
    config: options.Config = None,
    text: options.Text = None,
    label: options.Label = None,
    image: options.Image = None,
    audio: options.Audio = None,
    mask: options.Mask = None,
    ignore_index: options.IgnoreIndex = 255,
    workers: options.Workers = None,
    task: options.Task = None,
    family: options.Anatomy = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Measure quality on labelled data, and agreement with the dense model on any data.

    Examples:

      optin eval m-60/ --baseline demo:minilm --data builtin:docs

      optin eval m-60/ --baseline ./my-bert --data glue/sst2 --max-drop 1
    """
    from optin_cli.data.opening import open_batches
    from optin_cli.measure import evaluate as stage

    if max_drop is not None and baseline is None:
        raise UsageError("--max-drop needs a dense model to compare with", "give --baseline MODEL")
    opened = options.open_with(model, task, family, device, dtype)
    dense = options.open_with(baseline, task, family, device, dtype) if baseline else None
    spec = options.data_spec(
        data,
        split,
        config,
        text,
        label,
        image,
        workers=workers,
        mask=mask,
        ignore_index=ignore_index,
        audio=audio,
    )
    batches = open_batches(spec, opened, samples, batch_size, seed, max_length=max_length)
    with console.progress(not json) as on_progress:
        evaluation = stage.evaluate(opened, batches, dense, on_progress)
    if json:
        console.emit_json({"model": model, "baseline": baseline, "data": data, **asdict(evaluation)})
    else:
        show(evaluation, data, split)
    if max_drop is not None:
        stage.gate(evaluation, max_drop)


_SHOWN = {"top1": "top-1", "top5": "top-5"}


def show(evaluation: Evaluation, data: str, split: str) -> None:
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
