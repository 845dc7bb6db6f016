"""Measure quality and speed of a model against the dense one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from optin_cli.api.models import Data, Model, Progress, open_model, silent
from optin_cli.artefacts.latency import LatencyTable
from optin_cli.data.opening import as_data, open_batches
from optin_cli.data.sources import DataSpec
from optin_cli.errors import UnknownArchitecture, UsageError, param
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.measure import evaluate as measuring
from optin_cli.measure import latency
from optin_cli.measure.evaluate import Evaluation
from optin_cli.measure.generation import Generation
from optin_cli.measure.generation import bench_generation as generate
from optin_cli.measure.inputs import default_size
from optin_cli.measure.latency import KNEE, Timing
from optin_cli.measure.latency_table import make_table
from optin_cli.measure.runners import Execution
from optin_cli.runtimes.opening import is_exported, open_exported


def evaluate(
    model: Model,
    data: Data,
    *,
    baseline: Model | None = None,
    samples: int | None = None,
    max_drop: float | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    split: str | None = None,
    seed: int = 0,
    on_progress: Progress = silent,
) -> Evaluation:
    """Measure quality on labelled data, and agreement with a dense model on any data.

    Args:
        model: see `open_model`; or an exported file, or a directory with one.
        data: see `score`; by default its split `validation`, where it has a name.
        baseline: the dense model to compare with.
        samples: examples drawn by `seed`; by default all.
        max_drop: points that may be lost to the baseline, of an error rate gained, of perplexity per cent.
        batch_size, max_length: examples in a batch, and tokens of a text at most.
        split: of the data.
        seed: of what is drawn.
        on_progress: called with (batches done, batches in all, what is being done).

    Returns:
        `metrics` (points: 100 is perfect; less is better of errors), `baseline_metrics`, `fidelity` to the baseline,
        and the `drop`.

    Raises:
        UsageError: where there is nothing to measure: neither labels nor a baseline.
        GateError: where more than `max_drop` is lost.

    Example:
        >>> found = optin.evaluate(small, batches, baseline=model)
        >>> sorted(found.fidelity)
        ['agreement', 'kl']
    """
    if max_drop is not None and baseline is None:
        raise UsageError(
            f"{param('max_drop')} needs a dense model to compare with", f"give {param('baseline')}"
        )
    ours = _opened(model)
    dense = None if baseline is None else _dense(baseline, ours)
    rows = as_data(data, split if isinstance(data, DataSpec) else split or "validation")
    batches = open_batches(rows, ours, samples, batch_size, seed, max_length=max_length)
    found = measuring.evaluate(ours, batches, dense, on_progress)
    if max_drop is not None:
        measuring.gate(found, max_drop)
    return found


def bench(
    model: Model,
    *,
    baseline: Model | None = None,
    batch_size: int | str | Iterable[int] = (1, 32),
    seq_len: int | Iterable[int] | None = None,
    image_size: int | Iterable[int] | None = None,
    repeats: int = 10,
    seconds: float = 5.0,
    compile: bool = False,
    cuda_graph: bool = False,
    first_load: bool = False,
    seed: int = 0,
    on_progress: Progress = silent,
) -> list[Timing]:
    """Measure latency, throughput, memory and MACs, dense and pruned interleaved in one process.

    Args:
        model: see `open_model`; or an exported file, or a directory with one.
        baseline: the dense model to compare with.
        batch_size: one or several; or `knee`: 1, 2, 4, ... until more give the first model less than 5 % more
            throughput. Batch 1 is then the `point` "single stream", the knee "offline".
        seq_len: lengths in tokens, for models of text; by default 128.
        image_size: sides in pixels, for vision models; by default the model's own.
        repeats: forwards of each model, at least.
        seconds: spent on each setting.
        compile: time the models as torch.compile makes them.
        cuda_graph: record each model's forward as a CUDA graph and time its replay.
        first_load: also time opening each model from its files, and its first forward.
        seed: of the random inputs.
        on_progress: called with (settings done, settings in all, what is being done).

    Returns:
        A `Timing` for each setting and model, the baseline first: `median_ms`, `throughput` in examples a second,
        `peak_memory` in bytes, `macs` of an example, `params`. `speedup(dense, pruned)` compares two of one setting.

    Raises:
        UsageError: for a setting that one of the models can't run.

    Example:
        >>> dense, pruned = optin.bench(small, baseline=model, batch_size=2, seq_len=8, repeats=2, seconds=0)
        >>> pruned.macs < dense.macs
        True
    """
    ours = _opened(model)
    asked: int | Iterable[int] | None = _size_for(ours, seq_len, image_size)
    models = [ours] if baseline is None else [_dense(baseline, ours), ours]
    sizes = None if asked is None else _numbers(asked)
    how: dict[str, Any] = {
        "repeats": repeats,
        "seconds": seconds,
        "execution": Execution(compile, cuda_graph),
        "first_load": first_load,
        "seed": seed,
        "on_progress": on_progress,
    }
    if isinstance(batch_size, str):
        if batch_size != KNEE:
            raise UsageError(param("batch_size", batch_size), f"give numbers, or {KNEE!r}")
        return latency.bench_to_knee(models, sizes, **how)
    return latency.bench(models, _numbers(batch_size), sizes, **how)


def bench_generation(
    model: Model,
    *,
    baseline: Model | None = None,
    batch_size: int | Iterable[int] = (1,),
    seq_len: int | None = None,
    new_tokens: int = 32,
    repeats: int = 3,
    seconds: float = 5.0,
    seed: int = 0,
    on_progress: Progress = silent,
) -> list[Generation]:
    """Measure a decoder's two speeds: reading a prompt (prefill), and writing one token after the other (decode).

    Args:
        model: see `open_model`.
        baseline: the dense model to compare with.
        batch_size: one or several.
        seq_len: tokens that are read; by default 128 less those that are written.
        new_tokens: tokens that are written, greedily and with a cache.
        repeats: rounds, at least.
        seconds: spent on each batch size.
        seed: of the random prompts.
        on_progress: called with (batch sizes done, batch sizes in all, what is being done).

    Returns:
        A `Generation` for each batch size and model, the baseline first: milliseconds of the prompt and of a token,
        tokens a second.

    Raises:
        UsageError: for a model that is no decoder, and more tokens than it takes.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8))
        >>> decoder = optin.open_model(gpt2, processor=tokenizer)
        >>> (found,) = optin.bench_generation(decoder, seq_len=4, new_tokens=2, seconds=0)
        >>> found.prompt, found.new
        (4, 2)
    """
    ours = open_model(model)
    models = [ours] if baseline is None else [_dense(baseline, ours), ours]
    return generate(
        models,
        _numbers(batch_size),
        seq_len,
        new_tokens,
        repeats=repeats,
        seconds=seconds,
        seed=seed,
        on_progress=on_progress,
    )


def latency_table(
    model: Model,
    *,
    batch_size: int = 32,
    seq_len: int | None = None,
    image_size: int | None = None,
    repeats: int = 10,
    seconds: float = 5.0,
    seed: int = 0,
    on_progress: Progress = silent,
) -> LatencyTable:
    """Time what the units of each site cost on this device, for the latency budgets of `select`.

    Args:
        model: see `open_model`.
        batch_size: examples in a batch.
        seq_len: length in tokens, for models of text; by default 128.
        image_size: side in pixels, for vision models; by default the model's own.
        repeats: rounds of each measurement, at least.
        seconds: spent on each kind of site.
        seed: of the random inputs.
        on_progress: called with (kinds done, kinds in all, what is being done).

    Returns:
        The table: `total_ms` of the whole model, `fixed_ms` of it without any unit, and a curve for each site.

    Raises:
        UsageError: for a setting that the model can't run.

    Example:
        >>> table = optin.latency_table(model, batch_size=2, seq_len=8, repeats=1, seconds=0)
        >>> table.setting["size"]
        8
    """
    ours = open_model(model)
    size = _size_for(ours, seq_len, image_size)
    return make_table(
        ours,
        batch_size,
        default_size(ours) if size is None else size,
        repeats=repeats,
        seconds=seconds,
        seed=seed,
        on_progress=on_progress,
    )


def _opened(model: Model, device: str = "auto") -> OpenModel:
    """Open a model, or an exported file to be run by its runtime."""
    if isinstance(model, str | Path) and is_exported(str(model)):
        return open_exported(str(model))
    return open_model(model, device=device)


def _dense(baseline: Model, pruned: OpenModel) -> OpenModel:
    """Open a baseline: of an unlisted architecture by the table that `pruned` carries."""
    try:
        return _opened(baseline, "cpu" if pruned.runtime is not None else "auto")
    except UnknownArchitecture:
        if pruned.record is None:
            raise
        return open_model(baseline, family=pruned.family)


def _size_for(model: OpenModel, seq_len: Any, image_size: Any) -> Any:
    """The one of the two that goes with what the model reads. Raises `UsageError` where the other is given."""
    modality = model.family.modality
    images = modality == "image"
    if (seq_len if images else image_size) is not None:
        raise UsageError(
            f"{model.spec} reads {modality}{'' if modality == 'audio' else 's'}",
            f"use {param('image_size' if images else 'seq_len')}",
        )
    return image_size if images else seq_len


def _numbers(given: int | Iterable[int]) -> list[int]:
    return [given] if isinstance(given, int) else list(given)
