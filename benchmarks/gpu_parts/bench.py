"""Latency of BERT-base and DeiT-S, dense and pruned, with the machinery of `optin bench`, interleaved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gpu_parts import models
from gpu_parts.job import Job
from optin_cli.loading.checkpoint import OpenModel, open_model
from optin_cli.measure.inputs import default_size
from optin_cli.measure.latency import bench, ideal_speedup
from optin_cli.measure.runners import EAGER, Execution

SHARES, ROUNDINGS = (0.7, 0.5), (1, "auto")
KNEE = 1.05
"""Twice the batch gives less than this times the throughput: the GPU is full."""
PRECISIONS = ("bfloat16", "tf32", "float32")


def run(job: Job) -> None:
    most = 4 if job.tiny else 256
    graph = job.device == "cuda"
    shapes = {"BERT-base": models.bert, "DeiT-S": models.deit}
    folders = {name: build(job.folder / name, job.tiny) for name, build in shapes.items()}
    for precision in PRECISIONS:
        for name, folder in folders.items():
            with job.step(f"{name} {precision} eager"), in_precision(precision) as dtype:
                to_the_knee(job, name, precision, family(str(folder), job.device, dtype), most)
    for name, folder in folders.items():
        for precision in ("bfloat16", "tf32"):
            with job.step(f"{name} {precision} CUDA graphs"), in_precision(precision) as dtype:
                if graph and job.left > 10:
                    some = family(str(folder), job.device, dtype)
                    for batch in (1, 8):
                        measure(job, name, precision, some, batch, Execution(cuda_graph=True))
    for name, folder in folders.items():
        how = Execution(compile=True, cuda_graph=graph)
        with job.step(f"{name} bfloat16 {how.name}"), in_precision("bfloat16") as dtype:
            if job.left > (0 if job.tiny else 40):  # compiling takes most of it
                dense = open_model(str(folder), device=job.device, dtype=dtype)
                measure(job, name, "bfloat16", [dense, models.pruned(dense, 0.5, "auto")], 1, how)


@contextmanager
def in_precision(name: str) -> Iterator[str]:
    """Within the context, float32 products use TF32 if that is asked for. Gives the dtype of the weights."""
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        yield "bfloat16" if name == "bfloat16" else "float32"
    finally:
        torch.set_float32_matmul_precision("highest")


def family(folder: str, device: str, dtype: str) -> list[OpenModel]:
    """The dense model, and pruned ones."""
    dense = open_model(folder, device=device, dtype=dtype)
    return [dense, *(models.pruned(dense, share, rounding) for share in SHARES for rounding in ROUNDINGS)]


def to_the_knee(job: Job, name: str, precision: str, several: list[OpenModel], most: int) -> None:
    """Double the batch until the dense model's throughput gains less than five per cent."""
    batch, before = 1, 0.0
    while batch <= most and job.left > 5:
        rows = measure(job, name, precision, several, batch, EAGER)
        now = rows[0]["throughput"]
        full = now < KNEE * before
        for row in rows:
            row["knee"] = full or batch == most
        job.write()
        if full:
            break
        batch, before = 2 * batch, now


def measure(
    job: Job, name: str, precision: str, several: list[OpenModel], batch: int, how: Execution
) -> list[dict[str, Any]]:
    """Time all of them at one batch, and record a row for each."""
    size = default_size(several[0])
    timings = bench(several, [batch], [size], repeats=5, seconds=0.05 if job.tiny else 0.5, execution=how)
    rows = []
    for model, timing in zip(several, timings, strict=True):
        ideal = ideal_speedup(several[0], model, size)
        speedup = timings[0].median_ms / timing.median_ms
        rows.append(
            {
                "shape": name,
                "precision": precision,
                "execution": how.name,
                "batch": batch,
                "model": "dense" if model is several[0] else model.spec,
                "ms": round(timing.median_ms, 4),
                "p10_ms": round(timing.p10_ms, 4),
                "p90_ms": round(timing.p90_ms, 4),
                "throughput": round(timing.throughput, 1),
                "tflops": round(2e-12 * timing.macs * timing.throughput, 2),
                "speedup": round(speedup, 3),
                "ideal": round(ideal, 3),
                "of_ideal": round(speedup / ideal, 3),
                "peak_mib": round(timing.peak_memory / 2**20),
            }
        )
    job.write(rows=[*job.facts.get("rows", []), *rows])
    job.say(
        f"batch {batch}: " + ", ".join(f"{r['model']} {r['ms']:.2f} ms ({r['speedup']:.2f}x)" for r in rows)
    )
    return rows
