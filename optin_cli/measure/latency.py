"""Latency of several models, interleaved in one process, so that drift hits all of them alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optin_cli.errors import UsageError, param
from optin_cli.execution.macs import count_macs, observed_tokens
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.measure.attention import attention_backend
from optin_cli.measure.energy import joules_of, open_meter
from optin_cli.measure.first_load import first_forward
from optin_cli.measure.inputs import check_setting, default_size, draw, dummy_inputs
from optin_cli.measure.memory import peak_memory
from optin_cli.measure.runners import EAGER, Execution, Runner, prepared

Inputs = Mapping[str, Tensor]
Progress = Callable[[int, int, str], None]
"""Called with (settings done, settings in all, what is being done)."""

_MOST_ROUNDS = 500
_DOUBLING_ROUNDS = 5
_SATURATED = 1.5
_STABLE, _LOOKED_AT = 0.05, 3
_RESAMPLES = 1000
KNEE_GAIN = 1.05
"""Twice the batch gives less than this times the throughput: the device is full."""
LARGEST_BATCH = 1024
KNEE = "knee"
"""In place of batch sizes: `bench_to_knee`."""
SINGLE_STREAM, OFFLINE = "single stream", "offline"


@dataclass(frozen=True)
class Setting:
    """A setting to time: a batch of examples of one size."""

    batch_size: int
    size: int
    """Sequence length for text, side in pixels for images; of recordings the transcript's, or frames without one."""


@dataclass(frozen=True)
class Timing:
    """One model under one setting."""

    model: str
    setting: Setting
    median_ms: float
    p10_ms: float
    p90_ms: float
    rounds: int
    """Forwards timed."""
    throughput: float
    """Examples a second, at the median."""
    peak_memory: int | None
    """Bytes: weights and the peak of activations in one forward. None of an exported file: its runtime does not say."""
    macs: int
    """MACs of one example, by torch's counter."""
    params: int
    device: str
    threads: int
    """CPU threads that torch may use."""
    dtype: str
    doubling: float | None
    """time(2 * batch) / time(batch); None when twice the batch does not fit in memory, and for compiled models: they
    would have to be compiled for it."""
    saturated: bool
    """False when twice the batch takes less than 1.5 times as long: a smaller model can't show its speed."""
    execution: str = EAGER.name
    """The way that the forwards were run; of an exported file the runtime."""
    warmup: int = 0
    """Forwards before that, until their times no longer changed."""
    attention: str = ""
    """`sdpa (flash)`, `eager` and so on: see `attention_backend`."""
    joules: float | None = None
    """Energy for one example on an NVIDIA GPU, where NVML counts it."""
    load_ms: float | None = None
    """Opening the model from its files, if asked for, and its first forward behind that; as the next."""
    first_ms: float | None = None
    point: str = ""
    """`single stream` (batch 1) or `offline` (the knee), where batch sizes were searched for the knee."""
    times: tuple[float, ...] = field(default=(), repr=False, compare=False)
    """Milliseconds of every forward timed, in the order of the rounds that models of one setting share."""


def bench(
    models: Sequence[OpenModel],
    batch_sizes: Sequence[int],
    sizes: Sequence[int] | None = None,
    *,
    repeats: int = 10,
    seconds: float = 5.0,
    warmup: int = 3,
    seed: int = 0,
    execution: Execution = EAGER,
    first_load: bool = False,
    on_progress: Progress | None = None,
) -> list[Timing]:
    """Time `models` under every setting, run by `execution`: a Timing for each setting and model, settings first.

    Models warm up for at least `warmup` rounds, until their times are stable or `seconds` are spent. Then each runs at
    least `repeats` times, and on until `seconds` are spent on the setting. `sizes` None is the first model's own size.
    With `first_load`, each model is opened from its files once more to time that. Raises `UsageError` for a setting
    that one of the models can't run, before anything is timed, and for a model that can't be run by `execution`.
    """
    if not models or not batch_sizes:
        raise UsageError("nothing to time", "give at least one model and one batch size")
    if len({model.family.modality for model in models}) > 1:
        raise UsageError("models of texts, images and recordings can't be timed on the same inputs")
    execution.check(models)
    sizes = list(sizes or [default_size(models[0])])
    settings = [Setting(batch_size, size) for size in sizes for batch_size in batch_sizes]
    for setting in settings:
        for model in models:
            check_setting(model, setting.batch_size, setting.size)
    loads = [
        first_forward(model, batch_sizes[0], sizes[0]) if first_load else (None, None) for model in models
    ]
    macs = {size: [count_macs(model, draw(model, 1, size, seed)) for model in models] for size in sizes}
    backends = [attention_backend(model, draw(model, 1, sizes[0], seed)) for model in models]
    timings: list[Timing] = []
    for done, setting in enumerate(settings):
        if on_progress:
            what = f"timing batches of {setting.batch_size} at size {setting.size}"
            on_progress(done, len(settings), what)
        found = _bench_setting(
            models, setting, macs[setting.size], max(repeats, 1), seconds, warmup, seed, execution
        )
        timings += [
            replace(timing, attention=backends[m], load_ms=loads[m][0], first_ms=loads[m][1])
            for m, timing in enumerate(found)
        ]
    if on_progress:
        on_progress(len(settings), len(settings), "timing")
    return timings


def bench_to_knee(
    models: Sequence[OpenModel],
    sizes: Sequence[int] | None = None,
    *,
    largest: int = LARGEST_BATCH,
    on_progress: Progress | None = None,
    **options: Any,
) -> list[Timing]:
    """Time `models` at batches of 1, 2, 4, ... until twice the batch gives the first model, the dense one, less than
    5 % more throughput: the knee. The rest is as in `bench`.

    Batch 1 is marked as the point `single stream`, the knee as `offline`, as MLPerf Inference names the two scenarios
    (Reddi et al., ISCA 2020). The largest batch that fits in memory ends the search, too.
    """
    found: list[Timing] = []
    for size in sizes or [default_size(models[0])]:
        steps: list[list[Timing]] = []
        batch = 1
        while batch <= largest:
            if on_progress:
                whole = largest.bit_length()
                on_progress(len(steps), whole, f"timing batches of {batch} at size {size}")
            try:
                steps.append(bench(models, [batch], [size], **options))
                options.pop("first_load", None)  # the first batch size's stands for all
            except UsageError as error:
                if not steps or not isinstance(error.__cause__, torch.OutOfMemoryError):
                    raise
                break
            if len(steps) > 1 and steps[-1][0].throughput < KNEE_GAIN * steps[-2][0].throughput:
                break
            batch *= 2
        found += _named(steps)
    return found


def _named(steps: list[list[Timing]]) -> list[Timing]:
    """All timings, with the two points named. The knee is the smallest batch within 5 % of the best throughput."""
    best = max(step[0].throughput for step in steps)
    knee = next(index for index, step in enumerate(steps) if step[0].throughput * KNEE_GAIN >= best)
    names = {0: [SINGLE_STREAM]}
    names.setdefault(knee, []).append(OFFLINE)
    return [
        replace(timing, point=" and ".join(names.get(index, [])))
        for index, step in enumerate(steps)
        for timing in step
    ]


def speedup(dense: Timing, pruned: Timing) -> float:
    """Return how many times faster `pruned` is, by the medians of one setting. Raises `ValueError` for two settings.

    Example:
        >>> dense, pruned = optin.bench(small, baseline=model, batch_size=2, seq_len=8, repeats=2, seconds=0)
        >>> optin.speedup(dense, pruned) > 0
        True
    """
    if dense.setting != pruned.setting:
        raise ValueError(f"timings of different settings: {dense.setting} and {pruned.setting}")
    return dense.median_ms / pruned.median_ms


def speedup_interval(
    dense: Timing, pruned: Timing, *, share: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Return the bootstrap interval (low, high) of `speedup` that covers `share`, by the percentile method.

    Both models were timed in the same rounds, so rounds are drawn with both of their times: what slows down the
    machine for a while slows down both (Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).
    Raises `ValueError` for timings of different settings or rounds.

    Example:
        >>> dense, pruned = optin.bench(small, baseline=model, batch_size=2, seq_len=8, repeats=2, seconds=0)
        >>> low, high = optin.speedup_interval(dense, pruned)
        >>> 0 < low <= high
        True
    """
    if dense.setting != pruned.setting or len(dense.times) != len(pruned.times) or not dense.times:
        raise ValueError(f"timings of different rounds: {dense.setting} and {pruned.setting}")
    rounds = len(dense.times)
    drawn = np.random.default_rng(seed).integers(0, rounds, (_RESAMPLES, rounds))
    ours, theirs = (np.median(np.array(one.times)[drawn], axis=1) for one in (pruned, dense))
    low, high = np.quantile(theirs / ours, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def ideal_speedup(dense: OpenModel, pruned: OpenModel, size: int) -> float:
    """Dense over pruned MACs of the blocks on an example of `size`: the speed-up if time followed MACs."""
    costs = [
        m.anatomy.macs(observed_tokens(m, dummy_inputs(m, 1, size)), merges=m.merges) for m in (dense, pruned)
    ]
    return costs[0] / costs[1] if costs[1] else math.inf


def efficiency(measured: float, ideal: float) -> float:
    """The share of the ideal speed-up that was measured."""
    return measured / ideal


def _bench_setting(
    models: Sequence[OpenModel],
    setting: Setting,
    macs: Sequence[int],
    repeats: int,
    seconds: float,
    warmup: int,
    seed: int,
    execution: Execution,
) -> list[Timing]:
    try:
        inputs = [draw(model, setting.batch_size, setting.size, seed) for model in models]
        peaks = [
            None if model.runtime else peak_memory(model, given)
            for model, given in zip(models, inputs, strict=True)
        ]
        with prepared(models, inputs, execution) as runners:
            warm = _warm_up(runners, inputs, warmup, seconds)
            times = _interleave(runners, inputs, repeats, seconds)
            energy = [_joules(*one, setting.batch_size, seconds) for one in zip(runners, inputs, strict=True)]
        del runners  # a CUDA graph holds the memory of its forward
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"a batch of {setting.batch_size} at size {setting.size} does not fit in the memory of "
            f"{device_name(models[0].device)}",
            f"use a smaller {param('batch_size')}",
        ) from error
    doubled = None if execution.compile else _doubled_ms(models, setting, seed, execution)
    return [
        replace(
            _timing(model, setting, times[m], peaks[m], macs[m], doubled[m] if doubled else None, execution),
            warmup=warm,
            joules=energy[m],
        )
        for m, model in enumerate(models)
    ]


def _timing(
    model: OpenModel,
    setting: Setting,
    times: list[float],
    peak: int | None,
    macs: int,
    doubled: float | None,
    execution: Execution,
) -> Timing:
    p10, median, p90 = (float(value) for value in np.percentile(times, [10, 50, 90]))
    doubling = None if doubled is None else doubled / median
    return Timing(
        model=model.spec,
        setting=setting,
        median_ms=median,
        p10_ms=p10,
        p90_ms=p90,
        rounds=len(times),
        throughput=setting.batch_size / median * 1000,
        peak_memory=peak,
        macs=macs,
        params=sum(p.numel() for p in model.module.parameters()),
        device=device_name(model.device),
        threads=torch.get_num_threads(),
        dtype=model.dtype_name,
        doubling=doubling,
        saturated=doubling is None or doubling >= _SATURATED,
        execution=model.runtime.name if model.runtime else execution.name,
        times=tuple(times),
    )


def _warm_up(models: Sequence[Runner], inputs: Sequence[Inputs], least: int, seconds: float) -> int:
    """Run rounds until no model's times change any more; return how many.

    They are stable once the median of the last three is within 5 % of that of the three before. At least `least`
    rounds, and further ones for at most `seconds`.
    """
    times: list[list[float]] = [[] for _ in models]
    end, done = time.perf_counter() + seconds, 0
    with torch.inference_mode():
        while done < least or (time.perf_counter() < end and not all(map(_stable, times))):
            for m, (model, given) in enumerate(zip(models, inputs, strict=True)):
                times[m].append(_forward_ms(model, given))
            done += 1
    return done


def _stable(times: Sequence[float]) -> bool:
    if len(times) < 2 * _LOOKED_AT:
        return False
    before, now = (np.median(part) for part in (times[-2 * _LOOKED_AT : -_LOOKED_AT], times[-_LOOKED_AT:]))
    return bool(abs(now - before) <= _STABLE * before)


def _joules(model: Runner, inputs: Inputs, batch_size: int, seconds: float) -> float | None:
    """Energy for an example; None where it can't be read, or nothing is to be timed for longer."""
    meter = open_meter(model.device) if seconds else None
    if meter is None:
        return None
    with torch.inference_mode():
        found = joules_of(
            lambda: model.run(inputs), lambda: torch.cuda.synchronize(model.device), meter, seconds / 4
        )
    return found / batch_size


def _interleave(
    models: Sequence[Runner], inputs: Sequence[Inputs], repeats: int, seconds: float
) -> list[list[float]]:
    """Milliseconds of each forward, [model][round]. Every round starts with another model."""
    times: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        end = time.perf_counter() + seconds
        done = 0
        while done < repeats or (done < _MOST_ROUNDS and time.perf_counter() < end):
            for step in range(len(models)):
                m = (step + done) % len(models)
                times[m].append(_forward_ms(models[m], inputs[m]))
            done += 1
    return times


def _doubled_ms(
    models: Sequence[OpenModel], setting: Setting, seed: int, execution: Execution
) -> list[float] | None:
    """Median milliseconds at twice the batch; None if that does not fit in memory."""
    try:
        inputs = [draw(model, 2 * setting.batch_size, setting.size, seed) for model in models]
        with prepared(models, inputs, execution) as runners:
            _warm_up(runners, inputs, 1, 0.0)
            times = _interleave(runners, inputs, _DOUBLING_ROUNDS, 0.0)
        del runners
    except torch.OutOfMemoryError:
        return None
    return [float(np.median(ms)) for ms in times]


def _forward_ms(model: Runner, inputs: Inputs) -> float:
    return call_ms(lambda: model.run(inputs), model.device)


def call_ms(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call, its kernels included."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end)
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1000


def device_name(device: torch.device) -> str:
    """The GPU's name, or the type of any other device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
