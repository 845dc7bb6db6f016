"""Memory of an engine: a limit in bytes, and the errors of running out of it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path

import psutil
import torch

from optin_cli.execution.peak_memory import free_gpu_bytes

_SHARE = {"cuda": 0.8, "cpu": 0.5}
"""Of what is free: a GPU is ours alone, main memory also holds the data and other programs."""

_GROUPS = Path("/sys/fs/cgroup")


def free_bytes(devices: Iterable[torch.device]) -> int:
    """A share of the memory that is free on `devices`, divided among the processes of this machine."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    gpus = [device for device in devices if device.type == "cuda"]
    if not gpus:
        return int(_SHARE["cpu"] * _free_ram() / processes)
    return int(_SHARE["cuda"] * free_gpu_bytes(gpus) / math.ceil(processes / torch.cuda.device_count()))


def _free_ram() -> int:
    """Bytes of main memory that can be had; inside a container or a SLURM job no more than it may use."""
    available = psutil.virtual_memory().available
    own = _GROUPS / _own_group()
    for folder in (own, *own.parents):
        limit = folder / "memory.max"
        if limit.is_file() and (text := limit.read_text().strip()).isdigit():
            available = min(available, int(text))
    return available


def _own_group() -> str:
    """Path of this process's control group below the root of all groups; empty where there are none."""
    try:
        return Path("/proc/self/cgroup").read_text().partition("::")[2].splitlines()[0].lstrip("/")
    except (OSError, IndexError):
        return ""


def whole_steps(limit: float, each: float) -> int:
    """Return how often `each` bytes fit into `limit`, as a power of two: free memory varies a little, and a batch that
    is cut in another way is rounded in another way. At least 1."""
    fit = limit / max(each, 1.0)
    return 1 << math.floor(math.log2(fit)) if fit >= 1 else 1


def ran_out(error: BaseException) -> bool:
    """Return whether an error means that there was not enough memory, on a GPU or in main memory."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and any(text in str(error) for text in ("can't allocate memory", "STATUS_ALLOC_FAILED"))
    )
