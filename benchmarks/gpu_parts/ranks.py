"""Latency of BERT-base and DeiT-S whose attention alone is cut: fewer heads or lower ranks, round and odd sizes."""

from __future__ import annotations

from ranks import cut_shapes

from gpu_parts import models
from gpu_parts.bench import in_precision, measure
from gpu_parts.job import Job
from optin_cli.loading.checkpoint import open_model
from optin_cli.measure.runners import EAGER

BATCHES = (1, 32)


def run(job: Job) -> None:
    for name, build in {"BERT-base": models.bert, "DeiT-S": models.deit}.items():
        folder = build(job.folder / name, job.tiny)
        for precision in ("bfloat16", "float32"):
            with job.step(f"{name} {precision}"), in_precision(precision) as dtype:
                some = cut_shapes(open_model(str(folder), device=job.device, dtype=dtype))
                for batch in BATCHES:
                    if job.left > 5:
                        measure(job, f"{name}, heads x rank", precision, some, batch, EAGER)
