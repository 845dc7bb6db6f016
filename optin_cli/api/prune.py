"""Score, select and apply in one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from optin_cli import pipeline
from optin_cli.api.apply import make_settings
from optin_cli.api.models import Data, Model, Progress, as_path, open_model, silent
from optin_cli.api.select import make_request
from optin_cli.api.sweep import make_measuring, measured_on
from optin_cli.artefacts.latency import LatencyTable
from optin_cli.artefacts.mask import read_mask
from optin_cli.data.opening import as_data
from optin_cli.errors import UsageError, param
from optin_cli.loading.checkpoint import open_like
from optin_cli.pruning.apply import PrunedModel, check_output, recorded_report, reopened
from optin_cli.scoring.methods.registry import configured
from optin_cli.scoring.plan import make_plan
from optin_cli.scoring.settings import DEFAULT_METHOD, ScoreSettings
from optin_cli.selection.budget import Budget
from optin_cli.selection.settings import Request, scored_for
from optin_cli.sizes import byte_count
from optin_cli.trials.pick import Promise, promised
from optin_cli.trials.run import Recipe, Trials, check_sizes, open_trials
from optin_cli.trials.search import copy_model, search_budget


def prune(
    model: Model,
    data: Data,
    *,
    output: str | Path | None = None,
    flops: float | None = None,
    params: float | None = None,
    memory: float | str | None = None,
    latency: float | None = None,
    latency_ms: float | None = None,
    latency_table: LatencyTable | str | Path | None = None,
    budgets: Sequence[Budget] = (),
    ranking: str | Path | None = None,
    samples: int = 512,
    method: str = DEFAULT_METHOD,
    probes: int = 2,
    output_weight: float | None = None,
    feature_weights: str | Sequence[float] | None = None,
    interactions: str = "none",
    min_heads: int = 0,
    min_neurons: int = 0,
    min_channels: int = 0,
    max_prune: float = 1.0,
    protect: str | Sequence[str] = (),
    only: str | None = None,
    round_to: int | str = "auto",
    relative_to: str = "dense",
    tokens: str | float | None = None,
    ranks: bool | None = None,
    uniform: bool = False,
    compensate: str = "auto",
    producers: bool = True,
    readout: bool = True,
    bn: bool = False,
    compensate_samples: int | None = None,
    compensate_memory: int | str = "4GiB",
    steps: int = 1,
    max_drop: float | None = None,
    min_speedup: float | None = None,
    sweep: str | Path | None = None,
    eval_data: Data = None,
    eval_split: str | None = None,
    eval_samples: int | None = None,
    bench: bool = True,
    bench_batch_size: int | Iterable[int] = (1, 32),
    seq_len: int | None = None,
    image_size: int | None = None,
    repeats: int = 10,
    seconds: float = 2.0,
    batch_size: int = 32,
    max_length: int | None = None,
    split: str | None = None,
    seed: int = 0,
    force: bool = False,
    on_progress: Progress = silent,
) -> PrunedModel:
    """Score, select and apply in one.

    Args:
        model, data: see `open_model` and `score`.
        output: a directory to write.
        flops, params, memory, latency, latency_ms, latency_table, budgets: the budgets, see `select`; at least one, or
            one of the next two.
        max_drop: in place of a budget: finds the smallest model that loses at most so many points of the main metric
            (of an error rate gained, of perplexity per cent; without labels of agreement), by bisection over shares of
            the MACs.
        min_speedup: in place of a budget: finds the largest model that is measured to be so much faster, at the largest
            batch that is timed. It holds beside `max_drop`, too. Both need an `output`.
        sweep: the folder that keeps the trials of both as points of a sweep; by default `output` with `.sweep` added.
        eval_data, eval_split, eval_samples, bench, bench_batch_size, seq_len, image_size, repeats, seconds: what
            trials are measured on, see `sweep`.
        ranking: where the ranking is kept: the next budget then takes seconds.
        samples, method, probes, output_weight, batch_size, max_length, split, seed: see `score`.
        feature_weights, interactions, min_heads, min_neurons, min_channels, max_prune, protect, only, round_to,
            relative_to, tokens, ranks, uniform: see `select`.
        compensate, producers, readout, bn, compensate_samples, compensate_memory: see `apply`.
        steps: reach the budget in so many steps, each of which scores what is left.
        force: replace a pruned model at `output`, and take a latency table of another device.
        on_progress: called with (work done, all work, what is being done).

    Returns:
        The pruned model, as from `apply`; its `mask` says which units it kept.

    Raises:
        GateError: where no model keeps `max_drop` and `min_speedup`; it names the nearest miss, the trials stay.
        Otherwise what the three raise.

    Example:
        >>> small = optin.prune(model, batches, flops=0.6, samples=16, compensate_samples=16)
        >>> small.mask.reached["flops"] <= 0.6
        True
    """
    request = make_request(
        flops=flops,
        params=params,
        memory=memory,
        latency=latency,
        latency_ms=latency_ms,
        latency_table=latency_table,
        budgets=tuple(budgets),
        output_weight=None,
        feature_weights=feature_weights,
        interactions=interactions,
        min_heads=min_heads,
        min_neurons=min_neurons,
        min_channels=min_channels,
        max_prune=max_prune,
        protect=protect,
        only=only,
        round_to=round_to,
        relative_to=relative_to,
        tokens=tokens,
        ranks=ranks,
        uniform=uniform,
        force=force,
    )
    promise = Promise(max_drop=max_drop, min_speedup=min_speedup)
    searched = promised(promise, request, steps)
    if not searched:
        pipeline.check_steps(steps, request)
    elif output is None:
        raise UsageError(
            f"{param(promise.asked[0])} tries many models", f"give {param('output')} to keep them at"
        )
    settings = ScoreSettings(
        method=method,
        samples=samples,
        batch_size=batch_size,
        max_length=max_length,
        probes=probes,
        output_weight=output_weight,
        **scored_for([request]),
        seed=seed,
    )
    settings = configured(settings)  # what it raises comes before the model is opened
    limit = byte_count(compensate_memory, "compensate_memory")
    refit = make_settings(
        compensate, producers, readout, bn, compensate_samples, batch_size, max_length, limit, seed
    )
    measuring = make_measuring(eval_samples, bench, bench_batch_size, seq_len, image_size, repeats, seconds)
    dense = open_model(model)
    calibration = as_data(data, split)
    if searched and output is not None:
        check_sizes(dense, measuring)
        ours = data if calibration.held is None else calibration  # an iterator is read once
        trials = open_trials(
            Path(sweep) if sweep else Path(output).with_name(f"{Path(output).name}.sweep"),
            dense,
            lambda spec: open_like(spec, dense),
            measured_on(ours if eval_data is None else eval_data, eval_split),
            measuring,
            batch_size=batch_size,
            max_length=max_length,
            seed=seed,
            force=force,
        )
        plan = make_plan(dense, calibration, settings)
        path = as_path(ranking) or trials.folder / "ranking.h5"
        recipe = Recipe(plan, refit, path, compensate_samples is None)
        return _found(trials, recipe, request, promise, Path(output), on_progress)
    plan = make_plan(dense, calibration, settings)
    *_, last = pipeline.prune_in_steps(
        plan,
        request,
        as_path(output),
        as_path(ranking),
        steps,
        compensation=refit,
        at_most=compensate_samples is None,
        force=force,
        copied=True,
        on_progress=on_progress,
    )
    return last.model or reopened(last.applied, dense, last.mask)


def _found(
    trials: Trials,
    recipe: Recipe,
    request: Request,
    promise: Promise,
    output: Path,
    on_progress: Progress,
) -> PrunedModel:
    """The best of the trials, copied to `output` and opened there."""
    dense = recipe.plan.model
    check_output(output, dense)
    found = search_budget(trials, recipe, request, promise, on_progress)
    best = trials.folder / found.best.name
    copied = copy_model(best, output, force=trials.force)
    applied = replace(recorded_report(output, int(dense.dense["params"])), reused=not copied)
    return reopened(applied, dense, read_mask(trials.folder / f"{found.best.name}.mask.json"))
