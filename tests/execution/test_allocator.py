"""Freed memory stays in the process within the context, and only there."""

from __future__ import annotations

import subprocess
import sys

import pytest

LINUX = sys.platform == "linux"
COUNT = """
import resource
import torch
from optin_cli.execution.allocator import _glibc, freed_memory_kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(1 << 24)  # 64 MiB: 16,384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
faults()
outside = faults()
with freed_memory_kept():
    faults()
    with freed_memory_kept():
        faults()
    inside = faults()
print(_glibc() is not None, outside, inside, faults())
"""


def counted(environment: dict[str, str] | None = None) -> tuple[bool, int, int, int]:
    """Whether there is a glibc to set, and page faults before, within and after the context."""
    run = subprocess.run(
        [sys.executable, "-c", COUNT], env=environment, capture_output=True, text=True, check=True
    )
    found, *faults = run.stdout.split()
    before, within, after = map(int, faults)
    return found == "True", before, within, after


@pytest.mark.skipif(not LINUX, reason="page faults are counted on Linux")
def test_tensors_take_freed_pages_again() -> None:
    set_up, before, within, after = counted()
    if not set_up:
        pytest.skip("no glibc here, or the environment sets up the allocator")
    assert within < before / 10
    assert after > before / 2


@pytest.mark.skipif(not LINUX, reason="page faults are counted on Linux")
def test_what_the_user_has_set_up_stays() -> None:
    import os

    set_up, before, within, _ = counted({**os.environ, "MALLOC_TRIM_THRESHOLD_": "131072"})
    assert not set_up
    assert within > before / 2
