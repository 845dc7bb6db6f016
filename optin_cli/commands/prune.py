"""`optin prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from optin_cli import console
from optin_cli.commands import budgets, options
from optin_cli.commands.apply import compensation, tell
from optin_cli.commands.apply import describe as describe_applied
from optin_cli.commands.select import describe as describe_mask
from optin_cli.commands.select import report
from optin_cli.scoring.settings import DEFAULT_METHOD, ScoreSettings


def prune(
    model: options.Model,
    data: options.Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="Model directory to write.")],
    flops: budgets.Flops = None,
    params: budgets.Params = None,
    memory: budgets.Memory = None,
    latency: budgets.Latency = None,
    latency_table: budgets.Table = None,
    ranking: Annotated[
        Path | None,
        typer.Option(
            "--ranking", help="Ranking to reuse or write (default: rankings/<model>-<data>-<digest>.h5)."
        ),
    ] = None,
    split: options.Split = "train",
    samples: options.Samples = 512,
    method: options.Method = DEFAULT_METHOD,
    probes: options.Probes = 2,
    output_weight: options.ScoreLambda = None,
    feature_weights: budgets.FeatureWeights = None,
    interactions: budgets.Interactions = "none",
    min_heads: budgets.MinHeads = 0,
    min_neurons: budgets.MinNeurons = 0,
    min_channels: budgets.MinChannels = 0,
    max_prune: budgets.MaxPrune = 1.0,
    protect: budgets.Protect = None,
    only: budgets.Only = None,
    round_to: budgets.RoundTo = "1",
    relative_to: budgets.RelativeTo = "dense",
    tokens: budgets.Tokens = None,
    compensate: options.Compensate = "auto",
    producers: options.Producers = True,
    bn: options.Bn = False,
    compensate_samples: Annotated[
        int | None,
        typer.Option(
            "--compensate-samples", help="Examples to compensate on (default: 2048, or what there is)."
        ),
    ] = None,
    compensate_memory: Annotated[
        str,
        typer.Option(
            "--compensate-memory", help="Activations to hold in main memory; the rest goes to disk."
        ),
    ] = "4GiB",
    steps: Annotated[
        int, typer.Option("--steps", help="Reach the budget in so many steps, scoring anew at each.")
    ] = 1,
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
    seed: options.Seed = 0,
    force: options.Force = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Score, select, apply and compensate in one. The ranking is kept: the next budget takes seconds.

    Examples:

      optin prune demo:minilm --data builtin:docs --flops 0.6 -o m-60/

      optin prune ./my-bert --data glue/sst2 --flops 0.5 --min-heads 1 -o small/

      optin prune ./my-bert --data glue/sst2 --flops 0.3 --steps 4 -o tiny/
    """
    from optin_cli import pipeline
    from optin_cli.scoring.distributed import refuse_team
    from optin_cli.scoring.methods.registry import configured
    from optin_cli.scoring.plan import make_plan

    refuse_team("prune")
    asked = budgets.requests(
        flops=flops, params=params, memory=memory, latency=latency, table=latency_table,
        relative_to=relative_to, tokens=tokens, min_heads=min_heads, min_neurons=min_neurons,
        min_channels=min_channels,
        max_prune=max_prune, protect=protect, only=only, round_to=round_to, output_weight=None,
        feature_weights=feature_weights, interactions=interactions, force=force,
    )  # fmt: skip
    request = budgets.single(asked)
    pipeline.check_steps(steps, request)
    settings = ScoreSettings(
        method=method,
        samples=samples,
        batch_size=batch_size,
        max_length=max_length,
        probes=probes,
        output_weight=output_weight,
        tokens=request.merge != "none",
        seed=seed,
    )
    settings = configured(settings)  # what it raises comes before the model is opened
    refit = compensation(
        compensate,
        compensate_samples,
        batch_size,
        max_length,
        seed,
        compensate_memory,
        bn,
        "compensate_",
        producers=producers,
    )
    opened = options.open_with(model, task, family, device, "float32")
    rows_of = options.data_spec(
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
    plan = make_plan(opened, rows_of, settings)
    path = ranking or pipeline.ranking_path(plan, Path("rankings"))
    with console.progress(not quiet) as on_progress:
        *_, pruned = pipeline.prune_in_steps(
            plan, request, output, path, steps, rankings=path.parent, compensation=refit,
            at_most=compensate_samples is None, force=force, on_progress=on_progress,
        )  # fmt: skip
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
