"""Scoring BERT-base on 128 sequences of 128 tokens, and `apply` with compensation at 0.7.

Shares of the matrix rate are by formula. With F the FLOPs of a forward over all sequences and D blocks, a probe's
backward passes take (D + 1) / 2 of F (one from every block's feature but the first, one from the output; gradients of
activations alone), beside two forwards. Ablation of a unit of block l takes (D - 1 - l) / D of F.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import torch
from helpers.memory import serve_words, words

from gpu_parts import models
from gpu_parts.job import Job
from optin_cli.artefacts.ranking import Ranking
from optin_cli.compensation.plan import make_plan as make_compensation
from optin_cli.compensation.settings import Compensation
from optin_cli.execution.macs import count_macs
from optin_cli.loading.checkpoint import OpenModel, open_model
from optin_cli.pruning.apply import apply
from optin_cli.scoring.methods import ablation as ablation_module
from optin_cli.scoring.methods import curvature as curvature_module
from optin_cli.scoring.methods.ablation import Ablation
from optin_cli.scoring.methods.curvature import curvature
from optin_cli.scoring.plan import ScoreSettings, make_plan
from optin_cli.scoring.score import score
from optin_cli.selection.select import select

LENGTH = 128
_SPECIALS = 2  # [CLS] and [SEP] stand around the words of a text
_UNITS = 64  # of each site of neurons, that ablation is timed on


def run(job: Job) -> None:
    serve_words()
    folder = models.bert(job.folder / "bert", job.tiny)
    model = open_model(str(folder), device=job.device, dtype="float32")
    sequences = 8 if job.tiny else 128
    data = words(sequences, LENGTH - _SPECIALS)
    job.write(sequences=sequences, tokens=LENGTH, units=sum(site.units for site in model.anatomy))
    ranking = None
    for probes in (8, 2):  # the first call also pays for warming up: it is made once before
        with job.step(f"curvature, {probes} probes"):
            settings = ScoreSettings(samples=sequences, probes=probes)
            if probes == 8:
                score(
                    make_plan(model, data, ScoreSettings(samples=min(32, sequences), probes=1)),
                    job.folder / "warm.h5",
                )
            plan = make_plan(model, data, settings)
            with job.peak(f"curvature_{probes}"):
                seconds, ranking = job.timed(
                    lambda plan=plan: score(plan, job.folder / f"{plan.settings.probes}.h5")
                )
            flops = curvature_flops(model, plan, probes)
            job.write(**{f"curvature_{probes}": facts(seconds, flops)})
    with job.step("where the time of curvature goes"):
        job.write(
            curvature_profile=profiled(make_plan(model, data, ScoreSettings(samples=sequences, probes=8)))
        )
    with job.step("mixed: heads by ablation"):
        plan = make_plan(model, data, ScoreSettings(method="mixed", samples=sequences))
        seconds, _ = job.timed(lambda: score(plan, job.folder / "mixed.h5"))
        job.write(mixed={"seconds": round(seconds, 2)})
    for precision in ("reduced", *["full"] * (not job.brief)):
        with job.step(f"ablation, {precision}"), job.peak(f"ablation_{precision}"):
            settings = ScoreSettings(method="ablation", samples=sequences, precision=precision)
            job.write(**{f"ablation_{precision}": ablated(job, model, make_plan(model, data, settings))})
    with job.step("constants of the engines"):
        constants(job, model, data, sequences)
    if not job.brief:
        with job.step("apply with compensation on 2048 sequences"):
            compensated(job, folder, ranking, 16 if job.tiny else 2048)


def profiled(plan: Any) -> dict[str, Any]:
    """The 15 operations that take a GPU and a CPU longest while a batch is probed, in milliseconds."""
    sites = list(plan.model.anatomy)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if plan.model.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        curvature(plan.calibration, 0, sites, range(plan.settings.probes))
    events = profiler.key_averages()
    found = {}
    for where, attribute in (("gpu", "self_device_time_total"), ("cpu", "self_cpu_time_total")):
        times = sorted(((getattr(e, attribute) / 1e3, e.count, e.key[:90]) for e in events), reverse=True)
        found[where] = {
            "total_ms": round(sum(ms for ms, _, _ in times), 1),
            "longest": [[round(ms, 2), count, name] for ms, count, name in times[:15]],
        }
    return found


def constants(job: Job, model: OpenModel, data: Any, sequences: int) -> None:
    """Seconds of a batch's 8 probes by the work of a backward pass, and of ablation by the tokens of a call."""
    plan = make_plan(model, data, ScoreSettings(samples=sequences, probes=8))
    sites, found = list(model.anatomy), {}
    for exponent in (0, 36, 37, 38, 39):
        with mock.patch.dict(curvature_module._WORK_PER_CALL, {job.device: 1 << exponent}):
            found[exponent] = min(
                job.timed(lambda: curvature(plan.calibration, 0, sites, range(8)))[0] for _ in range(2)
            )
    job.write(probes_by_work={f"2^{exponent}": round(seconds, 3) for exponent, seconds in found.items()})
    site, found = model.anatomy["blocks.0.neurons"], {}
    units = np.arange(min(site.units, 128))
    for exponent in (17, 18, 19):
        with mock.patch.dict(ablation_module._TOKENS_PER_CALL, {job.device: 1 << exponent}):
            engine = Ablation(plan.calibration, 0, reduced=True)
            engine.score(site, units[: engine.step])
            found[engine.step] = job.timed(lambda engine=engine: engine.score(site, units))[0]
    job.write(ablation_by_variants={str(step): round(seconds, 3) for step, seconds in found.items()})


def facts(seconds: float, flops: float) -> dict[str, Any]:
    return {
        "seconds": round(seconds, 3),
        "pflop": round(flops / 1e15, 4),
        "tflops": round(flops / seconds / 1e12, 2),
    }


def forward_flops(model: OpenModel, plan: Any) -> float:
    """FLOPs of a forward over all sequences."""
    first = plan.calibration.batch(0)
    one = {name: value[:1] for name, value in first.inputs.items()}
    return 2.0 * count_macs(model, one) * plan.calibration.batches.count


def curvature_flops(model: OpenModel, plan: Any, probes: int) -> float:
    depth = len(model.anatomy.blocks)
    return (2 + probes * (depth + 1) / 2) * forward_flops(model, plan)


def ablated(job: Job, model: OpenModel, plan: Any) -> dict[str, Any]:
    """Ablation of all heads and some neurons of every block on one batch; all units and batches by proportion."""
    depth, batches = len(model.anatomy.blocks), len(plan.calibration)
    each = forward_flops(model, plan) / batches
    engine = Ablation(plan.calibration, 0, plan.settings.precision == "reduced")
    sites = [site for site in model.anatomy if site.units]
    for site in sites:  # kernels are chosen, and how the first block is run
        engine.score(site, np.arange(min(site.units, 2)))
    seconds, timed_seconds, flops, all_flops = 0.0, 0.0, 0.0, 0.0
    for site in sites:
        units = np.arange(min(site.units, _UNITS))
        took, _ = job.timed(lambda site=site, units=units: engine.score(site, units))
        unit_flops = (depth - 1 - site.block) / depth * each
        timed_seconds += took
        seconds += took / len(units) * site.units * batches
        flops += unit_flops * len(units)
        all_flops += unit_flops * site.units * batches
    return {
        "seconds_by_proportion": round(seconds, 1),
        "timed_seconds": round(timed_seconds, 2),
        "variants_in_a_call": engine.step,
        "pflop": round(all_flops / 1e15, 3),
        "tflops": round(flops / timed_seconds / 1e12, 2),
    }


def compensated(job: Job, folder: Any, ranking: Ranking | None, samples: int) -> None:
    assert ranking is not None
    mask = select(ranking, 0.7)
    model = open_model(str(folder), device=job.device, dtype="float32")
    rows = words(samples, LENGTH - _SPECIALS)
    with job.peak("apply"):
        plan = make_compensation(model, mask, Compensation(samples=samples), rows)
        seconds, applied = job.timed(lambda: apply(model, mask, job.folder / "pruned", plan=plan))
    job.write(
        apply={
            "seconds": round(seconds, 2),
            "sequences": samples,
            "deviation": applied.deviation,
            "tolerance": applied.tolerance,
            "methods": sorted({fit.method for fit in applied.fits}),
        }
    )
