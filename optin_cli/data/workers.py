"""Work on images in separate processes, ahead of whoever takes the results, which come in order."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from optin_cli.errors import OptinError

T = TypeVar("T")

_MOST = 4  # beyond, it is the model that a CPU is needed for
_FEW = 128  # images that are decoded sooner than processes start


def worker_count(asked: int | None, images: int) -> int:
    """Processes to decode `images` images: as many as asked for, else what this machine can spare; 0 is none."""
    if asked is not None:
        return asked
    if images < _FEW:
        return 0
    allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # each process of a team has separate workers
    return max(0, min(_MOST, len(allowed(0)) - 1) // here)


def in_order(function: Callable[[int], T], count: int, workers: int) -> Iterator[T]:
    """function(0), .., function(count - 1), computed in `workers` processes, or in this one for 0.

    What the function gives is pickled, so it should hold arrays, not tensors: those would go through shared memory,
    of which containers have little. Raises what the function raises of `OptinError`.
    """
    workers = min(workers, count)
    if workers == 0:
        yield from map(function, range(count))
        return
    with warnings.catch_warnings(action="ignore"):  # of more processes than cores: they were asked for
        loader: DataLoader = DataLoader(
            _Calls(function, count),
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_interrupts,
            generator=torch.Generator(),  # the global one would be drawn from, and workers change what follows
        )
        results = iter(loader)
    for found in results:
        if isinstance(found, OptinError):
            raise found
        yield found


class _Calls(Dataset):
    def __init__(self, function: Callable[[int], Any], count: int) -> None:
        self.function = function
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        try:
            return self.function(index)
        except OptinError as error:  # handed over whole: the loader would make a traceback of it
            return error


def _as_it_is(found: Any) -> Any:
    return found


def _leave_interrupts(_: int) -> None:
    """Ctrl-C reaches every process of the terminal; this one ends when its parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
