"""`optin prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from optin_cli import console
from optin_cli.commands import options
from optin_cli.commands.apply import describe as describe_applied
from optin_cli.commands.apply import tell
from optin_cli.commands.select import describe as describe_mask
from optin_cli.commands.select import report


def prune(
    model: options.Model,
    data: options.Data,
    flops: options.Flops,
    output: Annotated[Path, typer.Option("--output", "-o", help="Model directory to write.")],
    ranking: Annotated[
        Path | None,
        typer.Option(
            "--ranking", help="Ranking to reuse or write (default: rankings/<model>-<data>-<digest>.h5)."
        ),
    ] = None,
    split: options.Split = "train",
    samples: options.Samples = 512,
    method: options.Method = "auto",
    probes: options.Probes = 4,
    lambda_: options.ScoreLambda = 1.0,
    min_heads: options.MinHeads = 0,
    min_neurons: options.MinNeurons = 0,
    protect: options.Protect = None,
    relative_to: options.RelativeTo = "dense",
    batch_size: options.BatchSize = 32,
    max_length: options.MaxLength = None,
    config: options.Config = None,
    text: options.Text = None,
    label: options.Label = None,
    image: options.Image = None,
    task: options.Task = None,
    anatomy: options.Anatomy = None,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    force: options.Force = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Score, select and apply in one. The ranking is kept: the next budget takes seconds.

    Examples:

      optin prune demo:minilm --data builtin:docs --flops 0.6 -o m-60/

      optin prune ./my-bert --data glue/sst2 --flops 0.5 --min-heads 1 -o my-bert-50/
    """
    from optin_cli import prune as pipeline
    from optin_cli.scoring.plan import ScoreSettings, make_plan
    from optin_cli.selection.select import Guards

    settings = ScoreSettings(
        method=method,
        samples=samples,
        batch_size=batch_size,
        max_length=max_length,
        probes=probes,
        output_weight=lambda_,
        seed=seed,
    )
    opened = options.open_with(model, task, anatomy, device, "float32")
    plan = make_plan(opened, options.data_spec(data, split, config, text, label, image), settings)
    path = ranking or pipeline.ranking_path(plan, Path("rankings"))
    budget = pipeline.Budget(flops, Guards(min_heads, min_neurons, tuple(protect or ())), relative_to)
    with console.progress(not quiet) as on_progress:
        pruned = pipeline.prune(plan, budget, output, path, force=force, on_progress=on_progress)
    if not quiet:
        console.note(f"{'reused' if pruned.ranking_reused else 'wrote'} the ranking {path}")
        report(pruned.mask)
        tell(pruned.applied)
    if json:
        console.emit_json(
            {
                "model": str(output),
                "ranking": str(path),
                "ranking_reused": pruned.ranking_reused,
                "mask": describe_mask(pruned.mask),
                **describe_applied(pruned.applied),
            }
        )
    else:
        console.data(str(output))
