"""What every part is given: where to run, how small, how long, and where results go."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Job:
    """One part at work. Facts are on disk as soon as they are known: a part that is stopped loses nothing."""

    part: str
    device: str
    """`cuda`, or `cpu` to try the script out."""
    tiny: bool
    out: Path
    folder: Path
    """For models; removed at the end."""
    seconds: float
    """How long the part may take."""
    brief: bool = False
    """Leave out what takes long and seldom changes."""
    started: float = field(default_factory=time.perf_counter)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.seconds - (time.perf_counter() - self.started)

    def say(self, text: str) -> None:
        print(f"[{self.part} {time.perf_counter() - self.started:5.1f} s] {text}", flush=True)

    def write(self, **facts: Any) -> None:
        """Add facts and write all of them."""
        self.facts |= facts
        (self.out / f"{self.part}.json").write_text(json.dumps(self.facts, indent=1) + "\n")

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Within the context, an error is told and recorded, and the part goes on."""
        self.say(name)
        try:
            yield
        except Exception as error:  # any: the steps behind this one have other things to prove
            message = f"{type(error).__name__}: {error}"
            self.say(f"FAILED {name}: {message}")
            self.write(failed={**self.facts.get("failed", {}), name: message[:2000]})
            import traceback

            traceback.print_exc()

    def synchronise(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def timed(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """(seconds, result) of a call, its kernels included."""
        self.synchronise()
        begin = time.perf_counter()
        result = call()
        self.synchronise()
        return time.perf_counter() - begin, result

    @contextmanager
    def peak(self, name: str) -> Iterator[None]:
        """Record the most bytes of GPU memory that were in use within the context."""
        if self.device != "cuda":
            yield
            return
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        yield
        self.write(**{f"{name}_peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)})
