"""Settings of a sweep: what its points are measured on, and which points there are beside the budgets."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from optin_cli.data.sources import DataSpec
from optin_cli.errors import UsageError, param
from optin_cli.sizes import check_numbers

RANDOM, UNCOMPENSATED, UNIFORM = "random", "uncompensated", "uniform"
VARIANTS = (RANDOM, UNCOMPENSATED, UNIFORM)


@dataclass(frozen=True)
class Measuring:
    """What every point is measured on. Raises `UsageError` for numbers out of range."""

    eval_data: str | None = field(
        default=None,
        metadata={
            "panel": "Data",
            "metavar": "DATA",
            "help": "Data to measure quality on (default: the calibration data's own validation split).",
        },
    )
    eval_split: str = field(
        default="validation", metadata={"panel": "Data", "help": "Split to measure quality on."}
    )
    eval_samples: int | None = field(
        default=None,
        metadata={
            "panel": "Data",
            "least": 1,
            "help": "Examples to measure on, drawn by seed (default: all).",
        },
    )
    bench: bool = field(
        default=True, metadata={"switch": True, "help": "Time every point beside the dense model."}
    )
    bench_batch_size: tuple[int, ...] = field(
        default=(1, 32), metadata={"metavar": "N[,N..]", "help": "Batch sizes that are timed."}
    )
    seq_len: int | None = field(
        default=None, metadata={"least": 1, "help": "Sequence length that is timed (text models)."}
    )
    image_size: int | None = field(
        default=None, metadata={"least": 1, "help": "Side of the images that are timed (vision models)."}
    )
    repeats: int = field(default=10, metadata={"least": 1, "help": "Forwards of each model, at least."})
    seconds: float = field(default=2.0, metadata={"help": "Time spent on each setting."})

    def __post_init__(self) -> None:
        check_numbers(Measuring, vars(self))
        if self.bench and (not self.bench_batch_size or min(self.bench_batch_size) < 1):
            raise UsageError(f"{param('bench_batch_size')}: give at least one batch size, of at least 1")

    def data(self, calibration: DataSpec) -> DataSpec:
        """The data to measure on: read like the calibration data, of the other split or another place."""
        if self.eval_data is None:
            return replace(calibration, split=self.eval_split, stream=False)
        return replace(
            calibration, spec=self.eval_data, split=self.eval_split, config=None, stream=False, held=None
        )


def check_variants(variants: tuple[str, ...], seeds: int) -> None:
    """Raise `UsageError` for variants that there are not, and for no seed at all."""
    if odd := [name for name in variants if name not in VARIANTS]:
        raise UsageError(param("variant", odd[0]), f"use {', '.join(VARIANTS)}")
    if seeds < 1:
        raise UsageError(f"{param('seeds', seeds)}: at least 1 is needed")
