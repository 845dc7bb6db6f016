"""Where freed main memory goes while a stage computes.

glibc gives large blocks back to the system as soon as they are freed. Each of their pages costs a fault when the next
tensor takes it, and zeros besides: a third of the time of scoring a language model on a CPU. Kept in the process, they
are taken again as they are.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_GROWN = {_MMAP: 1 << 25, _TRIM: 1 << 26}
"""Where glibc's own thresholds, which grow with what is freed, end in a process that has freed large blocks."""
_KEEP = {_MMAP: 1 << 30, _TRIM: (1 << 31) - 1}
"""Blocks below 1 GiB come from the heap, and the heap keeps what is freed. Older ones take no more than 32 MiB."""
_OWN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES", "LD_PRELOAD")
"""Variables by which users choose an allocator or set it up: theirs stays."""

_lock = Lock()
_within = 0


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within the context the process keeps main memory that is freed; afterwards the system gets it.

    The peak is hardly another one: what is kept is what comes next. Contexts may be nested, and in threads. Nothing
    happens where the C library is not glibc, or where the environment says how it is to work.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    _enter(libc, 1)
    try:
        yield
    finally:
        _enter(libc, -1)


def _glibc() -> Any:
    """The C library; None where there is nothing to set."""
    if sys.platform != "linux" or any(os.environ.get(name) for name in _OWN):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


def _enter(libc: Any, step: int) -> None:
    """Count one context more or less: the first one sets the thresholds, the last one sets them back."""
    global _within
    with _lock:
        before, _within = _within, _within + step
        if before and _within:
            return
        for option, value in (_KEEP if _within else _GROWN).items():
            if not libc.mallopt(
                option, value
            ):  # a threshold that is set grows no more: it must not stay small
                libc.mallopt(option, _GROWN[option])
        if not _within:
            libc.malloc_trim(0)
