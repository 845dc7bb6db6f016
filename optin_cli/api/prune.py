"""Score, select and apply in one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from optin_cli import pipeline
from optin_cli.api.apply import make_settings
from optin_cli.api.models import Data, Model, Progress, as_path, open_model, silent
from optin_cli.api.select import make_request
from optin_cli.artefacts.latency import LatencyTable
from optin_cli.data.opening import as_data
from optin_cli.export.apply import PrunedModel, reopened
from optin_cli.scoring.methods.registry import configured
from optin_cli.scoring.plan import make_plan
from optin_cli.scoring.settings import DEFAULT_METHOD, ScoreSettings
from optin_cli.selection.budget import Budget
from optin_cli.sizes import byte_count


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
    round_to: int | str = 1,
    relative_to: str = "dense",
    tokens: str | float | None = None,
    compensate: str = "auto",
    producers: bool = True,
    bn: bool = False,
    compensate_samples: int | None = None,
    compensate_memory: int | str = "4GiB",
    steps: int = 1,
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
        flops, params, memory, latency, latency_ms, latency_table, budgets: the budgets, see `select`; at least one.
        ranking: where the ranking is kept: the next budget then takes seconds.
        samples, method, probes, output_weight, batch_size, max_length, split, seed: see `score`.
        feature_weights, interactions, min_heads, min_neurons, min_channels, max_prune, protect, only, round_to,
            relative_to, tokens: see `select`.
        compensate, producers, bn, compensate_samples, compensate_memory: see `apply`.
        steps: reach the budget in so many steps, each of which scores what is left.
        force: replace a pruned model at `output`, and take a latency table of another device.
        on_progress: called with (work done, all work, what is being done).

    Returns:
        The pruned model, as from `apply`; its `mask` says which units it kept.

    Raises:
        What the three raise.

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
        force=force,
    )
    request.check()
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
    limit = byte_count(compensate_memory, "compensate_memory")
    refit = make_settings(compensate, producers, bn, compensate_samples, batch_size, max_length, limit, seed)
    dense = open_model(model)
    plan = make_plan(dense, as_data(data, split), settings)
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
