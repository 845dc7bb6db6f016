"""The card: its name and driver, what its matrix units reach on large matrices, and how fast it copies."""

from __future__ import annotations

import platform
import subprocess

import torch
import transformers

from gpu_parts.job import Job


def run(job: Job) -> None:
    job.write(
        torch=torch.__version__,
        transformers=transformers.__version__,
        python=platform.python_version(),
        cuda=torch.version.cuda or "",
    )
    if job.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        job.write(
            name=properties.name,
            memory_gib=round(properties.total_memory / 2**30, 1),
            gpus=torch.cuda.device_count(),
            driver=_driver(),
        )
    else:
        job.write(name=f"{platform.machine()} CPU", gpus=0, driver="")
    job.write(tflops=matrix_rates(job), copy_gb_s=copy_rate(job))
    job.say(f"{job.facts['name']}: {job.facts['tflops']}, {job.facts['copy_gb_s']} GB/s")


def matrix_rates(job: Job) -> dict[str, float]:
    """TFLOP/s of a product of two large square matrices of random numbers, by precision."""
    size = 256 if job.tiny else 8192
    rates = {}
    for name, dtype, setting in (
        ("bfloat16", torch.bfloat16, "highest"),
        ("tf32", torch.float32, "high"),
        ("float32", torch.float32, "highest"),
        ("float64", torch.float64, "highest"),
    ):
        torch.set_float32_matmul_precision(setting)
        a, b = (torch.randn(size, size, device=job.device, dtype=dtype) for _ in range(2))
        for _ in range(3):
            a @ b
        seconds, _ = job.timed(lambda a=a, b=b: [a @ b for _ in range(5)])
        rates[name] = round(5 * 2 * size**3 / seconds / 1e12, 3)
    torch.set_float32_matmul_precision("highest")
    return rates


def copy_rate(job: Job) -> float:
    """GB/s of a copy within the device's memory, bytes read and written."""
    source = torch.empty((1 << 20) if job.tiny else (1 << 31), dtype=torch.uint8, device=job.device)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds, _ = job.timed(lambda: [target.copy_(source) for _ in range(5)])
    return round(5 * 2 * source.numel() / seconds / 1e9, 1)


def _driver() -> str:
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
