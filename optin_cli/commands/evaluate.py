"""`optin eval`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated

import typer

from optin_cli import console
from optin_cli.commands import options
from optin_cli.commands.groups import Group, everyday
from optin_cli.commands.present import show_evaluation, show_reading
from optin_cli.errors import UsageError


@dataclass(frozen=True)
class Examples:
    """Which examples of the data are measured on, and how they are read."""

    samples: int | None = field(
        default=None, metadata={"least": 1, "help": "Examples drawn by seed (default: all)."}
    )
    batch_size: int = field(default=32, metadata={"least": 1, "help": "Examples in a batch."})
    max_length: int | None = field(
        default=None, metadata={"least": 1, "help": "Cut texts to this many tokens."}
    )
    seed: int = field(default=0, metadata={"least": 0, "help": "Seed of everything drawn."})


@everyday("data", "baseline", "split", "samples", "batch_size", "device")
def evaluate(
    model: options.Model,
    data: options.LabelledData,
    examples: Annotated[Examples, Group(Examples, panel="Data")],
    opening: options.TypedOpening,
    writing: options.Shown,
    baseline: options.Baseline = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            "--max-drop",
            rich_help_panel="Output",
            help="Exit with 5 if more points than this are lost to the baseline (error rate: gained; perplexity: per "
            "cent).",
        ),
    ] = None,
) -> None:
    """Measure quality on labelled data, and agreement with the dense model on any data.

    Examples:

      optin eval m-60/ --baseline demo:minilm --data builtin:prose

      optin eval m-60/ --baseline ./my-bert --data glue/sst2 --max-drop 1
    """
    from optin_cli.data.opening import open_batches
    from optin_cli.measure import evaluate as stage

    if max_drop is not None and baseline is None:
        raise UsageError("--max-drop needs a dense model to compare with", "give --baseline MODEL")
    opened = opening.open_measured(model)
    dense = opening.open_baseline(baseline, opened) if baseline else None
    batches = open_batches(
        data, opened, examples.samples, examples.batch_size, examples.seed, max_length=examples.max_length
    )
    show_reading(batches.examples)
    with console.progress(not (writing.json or writing.quiet)) as on_progress:
        evaluation = stage.evaluate(opened, batches, dense, on_progress)
    if writing.json:
        console.emit_json({"model": model, "baseline": baseline, "data": data.spec, **asdict(evaluation)})
    else:
        show_evaluation(evaluation, data.spec, data.split)
    if max_drop is not None:
        stage.gate(evaluation, max_drop)
