"""What compensation is asked for, and what it reports: plain data that `optin.json` records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from optin_cli.compensation.least_squares import METHODS, RIDGES
from optin_cli.errors import UsageError, param

GIB = 1 << 30
Progress = Callable[[float, float, str], None]
"""Called with (work done, all work, what is being done)."""


@dataclass(frozen=True)
class Compensation:
    """Everything about compensation that changes the result (but for `memory`). Recorded in the pruned model."""

    method: str = "auto"
    """`auto`, `none`, `bias`, `scale` or `full`: see `refit`."""
    producers: bool = True
    """Refit the layers that make the units, too: on what they now read."""
    samples: int = 2048
    batch_size: int = 32
    max_length: int | None = None
    held_out: int = 5
    """Every so many-th row chooses among the fits instead of being fitted."""
    ridges: tuple[float, ...] = RIDGES
    read_share: float = 0.5
    """Share of the weight that the tokens which the head reads have in the last block, where it reads a few only."""
    bn: bool = False
    """Measure BatchNorm statistics anew afterwards."""
    seed: int = 0
    memory: int = 4 * GIB
    """Bytes of activations in main memory; what is beyond goes to disk."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"unknown compensation {self.method!r}", f"choose one of {', '.join(METHODS)}")
        for name in ("samples", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{param(name, getattr(self, name))}: at least 1 is needed")

    def identity(self) -> dict[str, Any]:
        """What an artefact records: plain data."""
        settings = {**asdict(self), "ridges": list(self.ridges)}
        settings.pop("memory")
        return settings


@dataclass(frozen=True)
class SiteFit:
    """What compensation did at one site."""

    site: str
    method: str
    """`full`, `scale`, `bias` or `none`."""
    ridge: float | None
    """Relative to the mean diagonal of the Gram matrix."""
    before: float
    """Mean squared held-out error. Of a consumer it is that where the output joins the residual, as a share of the
    dense variance there; of a producer that of its own output, as a share of the dense mean square."""
    after: float
    rows: int
    """Tokens that were fitted, counted in tokens of one weight."""
    note: str = ""
    """What could not be fitted, and why."""
    layer: str = ""
    """Path of what was fitted; '' in records from before producers were, where it is the consumer."""
