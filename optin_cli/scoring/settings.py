"""What scoring is asked to do."""

from __future__ import annotations

from dataclasses import dataclass

from optin_cli.errors import UsageError, param

DEFAULT_METHOD = "curvature"
PRECISIONS = ("full", "reduced")


@dataclass(frozen=True)
class ScoreSettings:
    """Everything about scoring that changes the result. Recorded in the ranking.

    Raises `UsageError` for numbers out of range; what depends on the method, `methods.registry.configured` checks.
    """

    method: str = DEFAULT_METHOD
    samples: int = 512
    batch_size: int = 32
    max_length: int | None = None
    rows: int = 768
    """Tokens of a batch that enter the relations (OPTIN's K)."""
    probes: int = 2
    """Curvature probes for each batch."""
    rel_error: float | None = None
    """Probe until the median relative error of the scores that comes from probing is this; overrides `probes`."""
    precision: str = "full"
    """`reduced` lets ablation (and `reference`) multiply changes in TF32 or bfloat16."""
    exact_band: float | None = None
    """Share of the units on either side of the cut at `band_flops` that are scored again by ablation."""
    band_flops: float | None = None
    sketch_rows: int = 512
    """Gradients kept for the interactions between units; 0 for none."""
    temperature: float | None = None
    """Of the output term; None for the method's default."""
    output_weight: float | None = None
    """lambda: weight of the output term after both are brought to one median; of `knowledge` that of the
    representational part, of `reference` the paper's. None for the method's default."""
    per_batch: bool = False
    """`fisher` squares the mean gradient of a batch, not the gradient of every example."""
    head_weight: float = 1.0
    """mu: what `knowledge` multiplies the scores of heads with (K-prune: 64)."""
    tokens: bool = False
    """Whether to measure what merging tokens costs, too."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.head_weight <= 0:
            raise UsageError(f"a weight of heads of {self.head_weight:g} is not positive")
        for name in ("samples", "batch_size", "rows", "probes"):
            if getattr(self, name) < 1:
                raise UsageError(f"{param(name, getattr(self, name))}: at least 1 is needed")
        if self.temperature is not None and self.temperature <= 0:
            raise UsageError(f"{param('temperature', self.temperature)}: must be positive")
        if self.output_weight is not None and self.output_weight < 0:
            raise UsageError(f"{param('output_weight', self.output_weight)} is negative")
        if self.precision not in PRECISIONS:
            raise UsageError(f"unknown precision {self.precision!r}", f"use {' or '.join(PRECISIONS)}")
        if self.sketch_rows < 0:
            raise UsageError(
                f"{param('sketch_rows', self.sketch_rows)} is negative",
                f"0 or {param('sketch', False, python='sketch_rows=0')} keeps none",
            )
        if self.rel_error is not None and not 0 < self.rel_error < 1:
            raise UsageError(f"{param('rel_error', self.rel_error)} is not between 0 and 1")
        if (self.exact_band is None) != (self.band_flops is None):
            raise UsageError(
                f"{param('exact_band')} needs the budget whose cut it is around, and {param('band_flops')} the band",
                f"for example {param('exact_band', 0.1)} {param('band_flops', 0.6)}",
            )
        for name in ("exact_band", "band_flops"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UsageError(f"{param(name, value)} is not a fraction")
