"""A Llama of 1.1 B parameters in bfloat16: how fast it reads and writes, dense and at 0.7; scored and compensated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers.memory import serve_words, words

from gpu_parts import models
from gpu_parts.job import Job
from optin_cli.compensation.plan import make_plan as make_compensation
from optin_cli.compensation.settings import Compensation
from optin_cli.loading.checkpoint import OpenModel, open_model
from optin_cli.pruning.apply import apply
from optin_cli.scoring.plan import ScoreSettings, make_plan
from optin_cli.scoring.score import score
from optin_cli.selection.select import select

MEMORY = 16 << 30
"""What activations may take while scoring: the rest of 40 GB is for weights and what torch keeps."""


def run(job: Job) -> None:
    serve_words()
    window = 32 if job.tiny else 512
    with job.step("making the model"):
        folder = models.llama(job.folder / "llama", job.tiny, job.device)
    with job.step("tokens a second"):
        dense = open_model(str(folder), device=job.device, dtype="bfloat16")
        for name, model in (("dense", dense), ("0.7", models.pruned(dense, 0.7, "auto"))):
            job.write(speed={**job.facts.get("speed", {}), name: speed(job, model, window)})
            job.say(f"{name}: {job.facts['speed'][name]}")
        del dense, model
    if not job.brief:
        prune(job, folder, window)


def prune(job: Job, folder: Path, window: int) -> None:
    """Score on 64 windows, compensate on 256, write `llama-70`."""
    scored, fitted = (8, 16) if job.tiny else (64, 256)
    model = open_model(str(folder), device=job.device, dtype="float32")
    job.write(params=sum(p.numel() for p in model.module.parameters()), units=units(model))
    with job.step(f"score by curvature, {scored} windows of {window} tokens"), job.peak("score"):
        settings = ScoreSettings(samples=scored, batch_size=8, max_length=window)
        plan = make_plan(model, words(scored, window), settings, MEMORY)
        seconds, ranking = job.timed(lambda: score(plan, job.folder / "llama.h5"))
        job.write(score_seconds=round(seconds, 1), score_tokens=scored * window)
    with job.step(f"apply with compensation, {fitted} windows"), job.peak("apply"):
        mask = select(ranking, 0.7)
        wanted = Compensation(samples=fitted, batch_size=8, max_length=window)
        rows = make_compensation(model, mask, wanted, words(fitted, window))
        seconds, applied = job.timed(lambda: apply(model, mask, job.folder / "llama-70", plan=rows))
        job.write(
            apply_seconds=round(seconds, 1),
            apply_tokens=fitted * window,
            deviation=applied.deviation,
            tolerance=applied.tolerance,
            params_left=applied.params,
        )


def units(model: OpenModel) -> int:
    return sum(site.units for site in model.anatomy)


@torch.inference_mode()
def speed(job: Job, model: OpenModel, window: int) -> dict[str, Any]:
    """Tokens a second of reading a prompt and of writing after it, at batch 1 and 32, by `generate`; the best of 3."""
    module: Any = model.module
    new = 8 if job.tiny else 32
    found = {}
    for batch in (1, 32):
        ids = torch.randint(5, 100, (batch, window), device=job.device)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

        def write(tokens: int, given: dict[str, Any] = given) -> float:
            limits = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
            return min(
                job.timed(lambda: module.generate(**given, **limits, pad_token_id=0))[0] for _ in range(3)
            )

        write(2)
        reading = write(1)
        found[f"batch {batch}"] = {
            "read": round(batch * window / reading),
            "write": round(batch * (new - 1) / max(write(new) - reading, 1e-9)),
        }
    return found
