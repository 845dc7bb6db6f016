"""Several processes that score together, NCCL, and `--device-map auto`.

One GPU is shared by two processes: what they send are numpy arrays, through gloo. NCCL refuses two on one GPU, so it is
tried with one process a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers.memory import serve_words, words

from gpu_parts import models
from gpu_parts.job import Job
from optin_cli.artefacts.ranking import Ranking, read_ranking
from optin_cli.loading.checkpoint import open_model
from optin_cli.scoring.plan import ScoreSettings, make_plan
from optin_cli.scoring.score import score

_COMMAND = """
from helpers.memory import serve_words
from optin_cli.main import main
serve_words()
main()
"""
_NCCL = """
import os
import torch
import torch.distributed as dist
backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
if device.type == "cuda":
    torch.cuda.set_device(device)
dist.init_process_group(backend)
total = torch.full((1 << 20,), float(dist.get_rank() + 1), device=device)
dist.all_reduce(total)
size = dist.get_world_size()
assert bool((total == size * (size + 1) / 2).all()), total
found = [None] * size if dist.get_rank() == 0 else None
dist.gather_object(dist.get_rank(), found)
if dist.get_rank() == 0:
    assert found == list(range(size))
    print(f"all_reduce of {size} on {device.type} is right")
dist.destroy_process_group()
"""


def run(job: Job) -> None:
    serve_words()
    folder = models.bert(job.folder / "bert", tiny=True)
    data, settings = words(64, 30), {"samples": 64, "batch_size": 8, "probes": 4}
    gpus = torch.cuda.device_count() if job.device == "cuda" else 0
    processes = max(2, gpus)

    def alone(method: str, **options: Any) -> Ranking:
        model = open_model(str(folder), dtype="float32", **options)
        plan = make_plan(model, data, ScoreSettings(method=method, **settings))
        return score(plan, job.folder / f"{method}-{'-'.join(options)}.h5")

    with job.step(f"{processes} processes"):
        script, path = job.folder / "command.py", job.folder / "team.h5"
        script.write_text(_COMMAND)
        asked = [
            "score", str(folder), "--data", data.spec, "--samples", "64", "--batch-size", "8", "--probes", "4",
            "--method", "mixed", "--device", job.device, "--quiet", "-o", str(path),
        ]  # fmt: skip
        call(job, [*torchrun(processes), str(script), *asked])
        found = difference(alone("mixed", device=job.device), read_ranking(path))
        job.write(processes=processes, largest_difference=found)
    with job.step("NCCL"):
        reduce = job.folder / "reduce.py"
        reduce.write_text(_NCCL)
        call(job, [*torchrun(max(1, gpus)), str(reduce)])
        job.write(nccl_processes=gpus)
    with job.step("--device-map auto"):
        spread = alone("curvature", device_map="auto")
        job.write(device_map_largest_difference=difference(alone("curvature", device=job.device), spread))


def torchrun(processes: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


def call(job: Job, command: list[str]) -> None:
    """Run a command. Raises `RuntimeError` with the end of what it says when it fails."""
    paths = [str(Path(__file__).resolve().parents[2] / name) for name in ("", "tests")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    if job.device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=max(5.0, job.left)
    )
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr[-1500:]}")
    job.say((done.stdout.strip().splitlines() or [""])[-1])


def difference(one: Ranking, two: Ranking) -> float:
    """The largest difference of two scores of a unit, as a share of the largest score of its site."""
    return max(
        float(np.abs(a.score - b.score).max() / max(np.abs(a.score).max(), 1e-30))
        for a, b in zip(one.sites, two.sites, strict=True)
        if a.units
    )
