"""Latency of BERT-base and DeiT-S, dense and pruned, with the machinery of `optin bench`, interleaved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from gpu_parts import models
from gpu_parts.job import Job
from optin_cli.loading.checkpoint import OpenModel, open_model
from optin_cli.measure.inputs import default_size
from optin_cli.measure.latency import bench, ideal_speedup
from optin_cli.measure.runners import EAGER, Execution

SHARES = (0.7, 0.5)
BATCHES = (1, 8, 32, 64, 128, 256)
GRAPH_BATCHES = (1, 8)
KNEE = 1.05
"""Twice the batch gives less than this times the throughput: the GPU is full."""
ROUNDINGS: dict[str, tuple[int | str, ...]] = {
    "bfloat16": ("auto", 128), "tf32": ("auto", 64), "float32": (1, "auto")
}  # fmt: skip
"""Where tensor cores compute, `auto` beside twice as much: what more rounding would gain."""


def run(job: Job) -> None:
    graph = job.device == "cuda"
    shapes = {"BERT-base": models.bert, "DeiT-S": models.deit}
    folders = {name: build(job.folder / name, job.tiny) for name, build in shapes.items()}
    for precision in ("bfloat16", "tf32", *["float32"] * (not job.brief)):
        for name, folder in folders.items():
            with job.step(f"{name} {precision}"), in_precision(precision) as dtype:
                some = family(str(folder), job.device, dtype, ROUNDINGS[precision])
                if graph and precision != "float32" and job.left > 10:
                    for batch in GRAPH_BATCHES:
                        measure(job, name, precision, some, batch, Execution(cuda_graph=True))
                to_the_knee(job, name, precision, some)
    how = Execution(compile=True, cuda_graph=graph)
    with job.step(f"BERT-base bfloat16 {how.name}"), in_precision("bfloat16") as dtype:
        if job.left > (0 if job.tiny else 30):  # compiling takes most of it
            some = family(str(folders["BERT-base"]), job.device, dtype, ("auto",))
            measure(job, "BERT-base", "bfloat16", [some[0], some[-1]], 1, how)


@contextmanager
def in_precision(name: str) -> Iterator[str]:
    """Within the context, float32 products use TF32 if that is asked for. Gives the dtype of the weights."""
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        yield "bfloat16" if name == "bfloat16" else "float32"
    finally:
        torch.set_float32_matmul_precision("highest")


def family(folder: str, device: str, dtype: str, roundings: Sequence[int | str]) -> list[OpenModel]:
    """The dense model, and pruned ones."""
    dense = open_model(folder, device=device, dtype=dtype)
    return [dense, *(models.pruned(dense, share, rounding) for share in SHARES for rounding in roundings)]


def to_the_knee(job: Job, name: str, precision: str, several: list[OpenModel]) -> None:
    """Larger batches until twice the batch gains the dense model less than five per cent of throughput."""
    batches = [batch for batch in BATCHES if batch <= (8 if job.tiny else BATCHES[-1])]
    before = {0: 0.0}
    for batch in batches:
        if job.left < 5:
            return
        rows = measure(job, name, precision, several, batch, EAGER)
        before[batch] = rows[0]["throughput"]
        full = batch // 2 in before and before[batch] < KNEE * before[batch // 2]
        for row in rows:
            row["knee"] = full or batch == batches[-1]
        job.write()
        if full:
            return


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
