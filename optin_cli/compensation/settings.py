"""Settings and report of compensation: plain data that `optin.json` records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from optin_cli.errors import UsageError
from optin_cli.sizes import check_numbers

GIB = 1 << 30
METHODS = (AUTO, NONE, BIAS, SCALE, FULL) = ("auto", "none", "bias", "scale", "full")
RIDGES = (1e-2, 1e-1, 1.0)
"""Tried at each site, relative to the mean diagonal of its Gram matrix. A weaker pull gains a little on rows like the
fitted ones, and costs much on others."""
JOINED = 0.25
Progress = Callable[[float, float, str], None]
"""Called with (work done, all work, what is being done)."""


@dataclass(frozen=True)
class Compensation:
    """Everything about compensation that changes the result (but for `memory`). Recorded in the pruned model."""

    method: str = field(
        default=AUTO,
        metadata={
            "name": "compensate",
            "help": "Refit what is left to the dense model, without training: auto, none, bias, scale or full.",
        },
    )
    """See `refit`."""
    producers: bool = field(
        default=True,
        metadata={
            "switch": True,
            "help": "Refit the layers that make the units, too: to make of what they now read what the dense ones "
            "made.",
        },
    )
    readout: bool = field(
        default=True,
        metadata={
            "switch": True,
            "help": "Refit what stands behind the last block, too: pooler, classifier, projection.",
        },
    )
    samples: int = field(
        default=2048,
        metadata={"least": 1, "help": "Examples to compensate on (default: 2048, or what there is)."},
    )
    batch_size: int = field(default=32, metadata={"least": 1, "help": "Examples in a batch."})
    max_length: int | None = field(
        default=None, metadata={"least": 1, "help": "Cut texts to this many tokens."}
    )
    held_out: int = 5
    """Every so many-th row chooses among the fits instead of being fitted."""
    joined: float = JOINED
    """Tokens of texts joined to the longest that the model takes, as a share of those of the texts themselves; 0 for
    no such texts."""
    ridges: tuple[float, ...] = RIDGES
    read_share: float = 0.5
    """Share of the weight that the tokens which the head reads have in the last block, where it reads a few only."""
    bn: bool = field(
        default=False,
        metadata={
            "switch": True,
            "help": "Then measure the statistics of BatchNorms again, on the same examples.",
        },
    )
    seed: int = field(default=0, metadata={"least": 0, "help": "Seed of everything drawn."})
    memory: int = field(
        default=4 * GIB,
        metadata={"help": "Activations to hold in main memory; the rest goes to disk."},
    )
    """In bytes."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"unknown compensation {self.method!r}", f"choose one of {', '.join(METHODS)}")
        check_numbers(type(self), vars(self))

    def holds_out(self, row: int) -> bool:
        """Whether a row, by its position in the sample, chooses among the fits."""
        return row % self.held_out == self.held_out - 1

    def identity(self) -> dict[str, Any]:
        """Return what an artefact records: plain data."""
        settings = {**asdict(self), "ridges": list(self.ridges)}
        settings.pop("memory")
        return settings


@dataclass(frozen=True)
class SiteFit:
    """The result of compensation at one site."""

    site: str
    method: str
    """`full`, `scale`, `bias` or `none`."""
    ridge: float | None
    """Relative to the mean diagonal of the Gram matrix."""
    before: float
    """Mean squared held-out error. Of a consumer it is that where the output joins the residual, as a share of the
    dense variance there; of a producer the error of its output, as a share of the dense mean square."""
    after: float
    rows: int
    """Tokens that were fitted, counted in tokens of one weight."""
    note: str = ""
    """The parts that could not be fitted, and why."""
    layer: str = ""
    """Path of what was fitted; '' in records from before producers were, where it is the consumer."""
