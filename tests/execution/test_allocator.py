"""Freed memory stays in the process within the context, and only there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from optin_cli.execution import allocator

LINUX = sys.platform == "linux"
COUNT = """
import resource
import psutil
import torch
from optin_cli.execution.allocator import _glibc, freed_memory_kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(1 << 24)  # 64 MiB: 16,384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return psutil.Process().memory_info().rss >> 20

torch.set_num_threads(1)
faults()
outside, start = faults(), resident()
with freed_memory_kept():
    faults()
    with freed_memory_kept():
        faults()
    inside, kept = faults(), resident() - start
print(_glibc() is not None, outside, inside, kept, resident() - start)
"""


def counted(environment: dict[str, str] | None = None) -> tuple[bool, int, int, int, int]:
    """Whether there is a glibc to set, page faults before and within the context, and how many MiB of what was freed
    are held within and after it."""
    run = subprocess.run(
        [sys.executable, "-c", COUNT], env=environment, capture_output=True, text=True, check=True
    )
    found, *numbers = run.stdout.split()
    before, within, kept, left = map(int, numbers)
    return found == "True", before, within, kept, left


@pytest.mark.skipif(not LINUX, reason="page faults are counted on Linux")
def test_tensors_take_freed_pages_again_and_the_system_gets_them_afterwards() -> None:
    set_up, before, within, kept, left = counted()
    if not set_up:
        pytest.skip("no glibc here, or the environment sets up the allocator")
    assert within < before / 10
    assert kept >= 56  # of the 64 MiB of a tensor
    assert left <= 8


class OldLibrary:
    """A glibc that takes no threshold above 32 MiB, but for trimming."""

    def __init__(self) -> None:
        self.set: dict[int, int] = {}
        self.trims = 0

    def mallopt(self, option: int, value: int) -> int:
        if option == -3 and value > 1 << 25:
            return 0
        self.set[option] = value
        return 1

    def malloc_trim(self, _: int) -> int:
        self.trims += 1
        return 1


def test_an_older_library_gets_the_largest_threshold_it_takes(monkeypatch) -> None:
    """Setting any threshold ends their growth: one that was refused would stay at 128 KiB."""
    library = OldLibrary()
    monkeypatch.setattr(allocator, "_glibc", lambda: library)
    with allocator.freed_memory_kept():
        assert library.set == {-3: 1 << 25, -1: (1 << 31) - 1}
        assert library.trims == 0
    assert library.set == {-3: 1 << 25, -1: 1 << 26}
    assert library.trims == 1


@pytest.mark.skipif(not LINUX, reason="page faults are counted on Linux")
def test_what_the_user_has_set_up_stays() -> None:
    set_up, before, within, *_ = counted({**os.environ, "MALLOC_TRIM_THRESHOLD_": "131072"})
    assert not set_up
    assert within > before / 2
