"""Several processes that score together: started by torchrun, `accelerate launch` or SLURM, never by us.

Each takes every n-th item and hands its results to the first, which writes the one file. Alone, a team has one
member and nothing is sent. The first process that fails reports why; the others end with its exit code, in silence.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

from optin_cli.errors import ArtefactError, InputError, PeerFailure, UsageError, first_line

T = TypeVar("T")

log = logging.getLogger("optin")

# For all processes to appear. Afterwards there is nothing to time: one may have hours of work left when another is
# done, and the connections of a process that dies are closed by its system.
_APPEAR = timedelta(minutes=5)
_FOREVER = timedelta(days=30)
_REPORTING = 2.0  # seconds: torchrun ends all processes as soon as one ends, also the one that reports why


@dataclass(frozen=True)
class Team:
    """This process among the others."""

    rank: int = 0
    size: int = 1
    store: Any = field(default=None, repr=False)
    """A flag that all processes can read: whether one of them has failed."""

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, items: list[T]) -> list[T]:
        """The items this process does."""
        return items[self.rank :: self.size]

    def gather(self, mine: T) -> list[T]:
        """Collect the value of every process on the leader, in rank order; the others get nothing."""
        if self.size == 1:
            return [mine]
        import torch.distributed as dist

        found: list[Any] | None = [None] * self.size if self.leads else None
        with _lost_connections():
            dist.gather_object(mine, found, dst=0)
        return found or []

    def broadcast(self, leaders: T | None) -> T:
        """Send the leader's value to every process and return it there."""
        if self.size == 1:
            return leaders  # type: ignore[return-value]
        import torch.distributed as dist

        box = [leaders]
        with _lost_connections():
            dist.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[return-value]

    def barrier(self) -> None:
        """Wait until every process is here, so that an error of the leader ends all of them."""
        self.broadcast(None)

    def first(self, function: Callable[[], T]) -> T:
        """Call `function` on the leader alone and return its result in every process."""
        return self.broadcast(function() if self.leads else None)

    def check_same(self, identity: dict[str, Any]) -> None:
        """Raise `ArtefactError` in every process unless all would do the same work."""
        if self.size == 1:
            return
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        with _lost_connections():
            dist.all_gather_object(found, identity)
        for rank, other in enumerate(found):
            differs = [key for key in identity if other.get(key) != found[0].get(key)]
            if differs:
                raise ArtefactError(
                    f"process {rank} has another {', '.join(differs)} than process 0",
                    "give every process the same model, data and options",
                )

    def check_others(self) -> None:
        """Raise `PeerFailure` if another process has failed: to be called now and then while working."""
        if self.store is not None and self.store.check(["failed"]):
            raise PeerFailure(self._exit_code())

    def _exit_code(self) -> int:
        return int(self.store.get("exit code"))

    def fail(self, error: BaseException) -> None:
        """Tell the others that this process ends; raise `PeerFailure` if another was the first to."""
        code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
        try:
            if self.store.add("failed", 1) == 1:
                self.store.set("exit code", str(code))
                return
            code = self._exit_code()
        except RuntimeError:  # the process that kept the store is gone: nobody knows who was first
            return
        time.sleep(_REPORTING)
        raise PeerFailure(code) from error


@contextmanager
def joined() -> Iterator[Team]:
    """The team this process was started in: found from the environment that torchrun sets.

    Raises `UsageError` when the environment names a team but not this process's place in it, `InputError` when the
    others don't appear, and `PeerFailure` for whatever another process raised first.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        yield Team()
        return
    import torch
    import torch.distributed as dist

    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UsageError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set",
            "start the processes with torchrun, or unset WORLD_SIZE",
        )
    try:
        store, rank, count = next(dist.rendezvous("env://", timeout=_APPEAR))
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
        # what is sent are numpy arrays: they go through gloo, NCCL starts only for tensors on GPUs
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=_FOREVER)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"the {size} processes did not find each other: {first_line(error)}",
            "start all of them at once, on machines that reach MASTER_ADDR:MASTER_PORT",
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    team = Team(rank, count, dist.PrefixStore(f"optin/{attempt}", store))
    _mention_threads(team)
    try:
        yield team
    except PeerFailure:
        time.sleep(_REPORTING)
        raise
    except BaseException as error:
        team.fail(error)
        raise
    finally:
        dist.destroy_process_group()


def refuse_team(command: str) -> None:
    """Raise `UsageError` if this process was started as one of several."""
    with joined() as team:
        if team.size > 1:
            raise UsageError(
                f"`optin {command}` is the work of one process, and {team.size} were started",
                f"share the scoring (torchrun ... -m optin_cli score ... -o FILE.h5), then `optin {command} --ranking "
                "FILE.h5` alone",
            )


@contextmanager
def _lost_connections() -> Iterator[None]:
    """Say in one sentence that another process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise InputError(
            "another process of the team is gone, perhaps killed for its memory",
            "run the same command again: finished parts are kept",
        ) from error


def _mention_threads(team: Team) -> None:
    """torchrun gives every process one thread, however many cores there are."""
    import torch

    here = int(os.environ.get("LOCAL_WORLD_SIZE", team.size))
    allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    used, cores = here * torch.get_num_threads(), len(allowed(0))
    if team.leads and not torch.cuda.is_available() and 2 * used <= cores:
        log.info(
            "%d processes use %d of %d cores: set OMP_NUM_THREADS=%d to use them all",
            here, used, cores, cores // here,
        )  # fmt: skip
