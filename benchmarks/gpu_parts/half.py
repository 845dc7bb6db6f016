"""A bfloat16 checkpoint, scored and compensated in bfloat16 and in float32: how far the two agree."""

from __future__ import annotations

import numpy as np
import torch
from helpers.memory import serve_words, words
from scipy.stats import spearmanr

from gpu_parts import models
from gpu_parts.job import Job
from optin_cli.artefacts.ranking import Ranking
from optin_cli.compensation.plan import make_plan as make_compensation
from optin_cli.compensation.settings import Compensation
from optin_cli.loading.checkpoint import OpenModel, open_model
from optin_cli.measure.inputs import dummy_inputs
from optin_cli.pruning.apply import apply
from optin_cli.scoring.plan import ScoreSettings, make_plan
from optin_cli.scoring.score import score
from optin_cli.selection.select import select

DTYPES = ("float32", "bfloat16")


def run(job: Job) -> None:
    serve_words()
    folder = str(models.bert(job.folder / "bert-bf16", job.tiny, torch.bfloat16))
    sequences = 8 if job.tiny else 128
    data = words(sequences, 62)
    with job.step("scores"):
        rankings = {}
        for dtype in DTYPES:
            model = open_model(folder, device=job.device, dtype=dtype)
            plan = make_plan(model, data, ScoreSettings(samples=sequences, probes=8))
            rankings[dtype] = score(plan, job.folder / f"{dtype}.h5")
        job.write(rank_agreement=agreement(*rankings.values()))
        job.say(str(job.facts["rank_agreement"]))
    mask, results = select(rankings["float32"], 0.7), {}
    for dtype in DTYPES:
        with job.step(f"apply, computing in {dtype}"):
            model = open_model(folder, device=job.device, dtype=dtype)
            plan = make_compensation(
                model, mask, Compensation(samples=4 * sequences), words(4 * sequences, 62)
            )
            results[dtype] = apply(model, mask, job.folder / f"pruned-{dtype}", plan=plan)
            job.write(
                **{f"apply_{dtype}": {k: getattr(results[dtype], k) for k in ("deviation", "tolerance")}}
            )
    with job.step("what is left of the error"):
        after = {d: np.array([fit.after for fit in found.fits]) for d, found in results.items()}
        before = np.array([fit.before for fit in results["float32"].fits])
        dense = open_model(folder, device=job.device, dtype="float32")
        inputs = dummy_inputs(dense, 16, 64)
        with torch.inference_mode():
            outputs = {dtype: small(job, dtype).output(inputs) for dtype in DTYPES}
            expected = dense.output(inputs)
        job.write(
            error_before=float(before.mean()),
            error_after={dtype: float(found.mean()) for dtype, found in after.items()},
            output_error={d: float((o - expected).norm() / expected.norm()) for d, o in outputs.items()},
        )
        job.say(f"{job.facts['error_before']:.4f} -> {job.facts['error_after']}")


def small(job: Job, dtype: str) -> OpenModel:
    """The model that was compensated in `dtype`, in float32."""
    return open_model(str(job.folder / f"pruned-{dtype}"), device=job.device, dtype="float32")


def agreement(one: Ranking, two: Ranking) -> dict[str, float]:
    """Spearman's correlation of the scores of all units of a kind."""
    found = {}
    for kind in sorted(one.kinds):
        a, b = (np.concatenate([s.score for s in r.sites if s.kind == kind]) for r in (one, two))
        found[kind] = round(float(spearmanr(a, b).statistic), 5)
    return found
