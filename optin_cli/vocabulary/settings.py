"""How many tokens are kept, and by which examples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from optin_cli.errors import UsageError, param


@dataclass(frozen=True)
class VocabularySettings:
    """How many tokens of a vocabulary are kept, beside those that always are."""

    keep: int | None = field(
        default=None,
        metadata={
            "metavar": "N",
            "least": 1,
            "help": "Tokens of the new vocabulary: the most frequent of the data, then the first of all.",
        },
    )
    coverage: float | None = field(
        default=None,
        metadata={
            "metavar": "SHARE",
            "help": "Share of the data's tokens that are kept as they are (default: 1, all of them).",
        },
    )
    samples: int | None = field(
        default=None,
        metadata={"panel": "Calibration", "least": 1, "help": "Rows drawn by seed (default: all)."},
    )
    seed: int = field(
        default=0, metadata={"panel": "Calibration", "least": 0, "help": "Seed of everything drawn."}
    )

    def __post_init__(self) -> None:
        if self.keep is not None and self.coverage is not None:
            raise UsageError(
                f"{param('keep')} and {param('coverage')} both say how many tokens are kept",
                "leave one of them out",
            )
        if self.coverage is not None and not 0 < self.coverage <= 1:
            raise UsageError(
                f"{param('coverage', self.coverage)}: a share is more than 0 and at most 1",
                f"{param('coverage', 0.9999)} drops what one token in ten thousand is",
            )
        if self.keep is not None and self.keep < 1:
            raise UsageError(f"{param('keep', self.keep)}: at least 1 is needed")

    def identity(self) -> dict[str, Any]:
        """What decides which tokens are kept, beside model and data."""
        return {
            "keep": self.keep,
            "coverage": None if self.keep is not None else self.coverage or 1.0,
            "samples": self.samples,
            "seed": self.seed if self.samples is not None else None,
        }
