"""Prune to many budgets, measure every model, and pick one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from optin_cli.api.apply import make_settings
from optin_cli.api.models import Data, Model, Progress, open_model, silent
from optin_cli.api.select import make_request
from optin_cli.artefacts.files import check_output
from optin_cli.artefacts.latency import LatencyTable
from optin_cli.artefacts.point import Sweep, read_sweep
from optin_cli.data.opening import as_data
from optin_cli.data.sources import DataSpec
from optin_cli.errors import UsageError, param
from optin_cli.loading.checkpoint import open_like
from optin_cli.scoring.methods.registry import configured
from optin_cli.scoring.plan import Plan, make_plan
from optin_cli.scoring.settings import DEFAULT_METHOD, ScoreSettings
from optin_cli.selection.settings import scored_for
from optin_cli.sizes import byte_count
from optin_cli.trials import pick as choosing
from optin_cli.trials.run import check_sizes, open_trials
from optin_cli.trials.settings import Measuring
from optin_cli.trials.sweep import Series, check_requests
from optin_cli.trials.sweep import sweep as run

Amounts = float | Sequence[float] | None


def sweep(
    model: Model,
    data: Data,
    output: str | Path,
    *,
    flops: Amounts = None,
    params: Amounts = None,
    memory: Amounts = None,
    latency: Amounts = None,
    latency_ms: Amounts = None,
    latency_table: LatencyTable | str | Path | None = None,
    seeds: int = 1,
    variants: Sequence[str] = (),
    eval_data: Data = None,
    eval_split: str | None = None,
    eval_samples: int | None = None,
    bench: bool = True,
    bench_batch_size: int | Iterable[int] = (1, 32),
    seq_len: int | None = None,
    image_size: int | None = None,
    repeats: int = 10,
    seconds: float = 2.0,
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
    batch_size: int = 32,
    max_length: int | None = None,
    split: str | None = None,
    seed: int = 0,
    force: bool = False,
    on_progress: Progress = silent,
) -> Sweep:
    """Prune to many budgets with one ranking, evaluate and time each model, and keep all of them in one folder.

    What is there already is kept, so a sweep that was stopped goes on, and a later call adds budgets.

    Args:
        model, data: see `open_model` and `score`.
        output: the folder of the sweep.
        flops, params, memory, latency, latency_ms: budgets, see `select`; one of them may be a list.
        latency_table: for the last two, and to predict the latency under other budgets.
        seeds: so many series of points, each scored, refitted and drawn by another seed.
        variants: further points to compare with: `random` (units drawn by chance), `uncompensated`,
            `uniform`.
        eval_data: what quality is measured on; by default the split `validation` of `data`, or the batches given.
        eval_split, eval_samples: of that data, the split and how many examples; by default all.
        bench: time every model beside the dense one.
        bench_batch_size, seq_len, image_size, repeats, seconds: what is timed and for how long, see `bench`.
        ranking: where the ranking of the first seed is kept; by default in `output`.
        samples, method, probes, output_weight, batch_size, max_length, split, seed: see `score`.
        feature_weights, interactions, min_heads, min_neurons, min_channels, max_prune, protect, only, round_to,
            relative_to, tokens, ranks, uniform: see `select`.
        compensate, producers, readout, bn, compensate_samples, compensate_memory: see `apply`.
        force: make and measure everything again.
        on_progress: called with (points done, points in all, what is being done).

    Returns:
        The sweep: `points`, each with its `share` of the MACs, `drop`, `evaluation` and `timings`; `directory(point)`
        is where its model is.

    Raises:
        What the stages raise. Points made until then stay.

    Example:
        >>> found = optin.sweep(model, batches, folder / "sweep", flops=[0.8, 0.6], samples=16,
        ...                     compensate_samples=16, bench=False)
        >>> [point.name for point in found.points]
        ['flops-0.8', 'flops-0.6']
    """
    amounts = {
        "flops": flops,
        "params": params,
        "memory": memory,
        "latency": latency,
        "latency_ms": latency_ms,
    }
    others: dict[str, Any] = {
        "latency_table": latency_table,
        "budgets": (),
        "output_weight": None,
        "feature_weights": feature_weights,
        "interactions": interactions,
        "min_heads": min_heads,
        "min_neurons": min_neurons,
        "min_channels": min_channels,
        "max_prune": max_prune,
        "protect": protect,
        "only": only,
        "round_to": round_to,
        "relative_to": relative_to,
        "tokens": tokens,
        "ranks": ranks,
        "uniform": uniform,
        "force": force,
    }
    requests = [make_request(**others, **one) for one in _each(amounts)]
    check_requests(requests)
    settings = ScoreSettings(
        method=method,
        samples=samples,
        batch_size=batch_size,
        max_length=max_length,
        probes=probes,
        output_weight=output_weight,
        **scored_for(requests),
        seed=seed,
    )
    settings = configured(settings)
    limit = byte_count(compensate_memory, "compensate_memory")
    refit = make_settings(
        compensate, producers, readout, bn, compensate_samples, batch_size, max_length, limit, seed
    )
    path = None if ranking is None else Path(ranking)
    series = Series(settings, refit, compensate_samples is None, seeds, tuple(variants), path)
    series.check()
    measuring = make_measuring(eval_samples, bench, bench_batch_size, seq_len, image_size, repeats, seconds)
    folder = Path(output)
    check_output(folder / "point", "point")
    dense = open_model(model)
    check_sizes(dense, measuring)
    calibration = as_data(data, split)
    trials = open_trials(
        folder,
        dense,
        lambda spec: open_like(spec, dense),
        measured_on(data if eval_data is None else eval_data, eval_split),
        measuring,
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
        force=force,
    )

    def planner(chosen: ScoreSettings) -> Plan:
        return make_plan(dense, calibration, chosen)

    return run(trials, series.recipes(folder, planner(settings), planner), requests, on_progress)


def pick(
    sweep: Sweep | str | Path,
    *,
    max_drop: float | None = None,
    min_speedup: float | None = None,
    max_latency: float | None = None,
    batch_size: int | None = None,
) -> Path:
    """The directory of the best model of a sweep that keeps a promise.

    With a `max_drop` that is the one of the fewest MACs, otherwise the one that loses least. Promises that are given
    together hold together.

    Args:
        sweep: of `sweep`, or its folder.
        max_drop: points of the main metric that may be lost (of an error rate gained, of perplexity per cent; without
            labels of agreement).
        min_speedup: measured speed-up over the dense model, at the largest batch size that was timed.
        max_latency: measured milliseconds of a batch, at the smallest batch size that was timed.
        batch_size: the batch size that both are about, if there are several.

    Returns:
        A directory for `load` and `open_model`.

    Raises:
        GateError: where no model keeps the promise; it names the nearest miss.
        UsageError: for a promise about what was not measured.

    Example:
        >>> optin.pick(folder / "sweep", max_drop=100).name
        'flops-0.6'
    """
    found = sweep if isinstance(sweep, Sweep) else read_sweep(sweep)
    promise = choosing.Promise(max_drop, min_speedup, max_latency, batch_size)
    return found.directory(choosing.pick(found.main, promise, str(found.folder)))


def _each(amounts: dict[str, Amounts]) -> list[dict[str, Any]]:
    """The budgets with each amount of the one that is a list. Raises `UsageError` for two lists."""
    lists = [
        name
        for name, amount in amounts.items()
        if isinstance(amount, Sequence) and not isinstance(amount, str)
    ]
    if len(lists) > 1:
        raise UsageError(
            f"{param(lists[0])} and {param(lists[1])} are both lists",
            "give one list, the others one value each",
        )
    if not lists:
        return [dict(amounts)]
    several: Any = amounts[lists[0]]
    return [{**amounts, lists[0]: amount} for amount in several]


def make_measuring(
    eval_samples: int | None,
    bench: bool,
    bench_batch_size: int | Iterable[int],
    seq_len: int | None,
    image_size: int | None,
    repeats: int,
    seconds: float,
) -> Measuring:
    return Measuring(
        eval_samples=eval_samples,
        bench=bench,
        bench_batch_size=(bench_batch_size,)
        if isinstance(bench_batch_size, int)
        else tuple(bench_batch_size),
        seq_len=seq_len,
        image_size=image_size,
        repeats=repeats,
        seconds=seconds,
    )


def measured_on(data: Data, split: str | None) -> DataSpec:
    """The data that quality is measured on: its split `validation`, where it has a name."""
    found = as_data(data, split if isinstance(data, DataSpec) else split or "validation")
    return replace(found, stream=False) if found.held is None else found
