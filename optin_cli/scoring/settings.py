"""Settings of scoring."""

from __future__ import annotations

from dataclasses import dataclass, field

from optin_cli.errors import UsageError, param
from optin_cli.sizes import check_numbers

DEFAULT_METHOD = "curvature"
PRECISIONS = ("full", "reduced")


@dataclass(frozen=True)
class ScoreSettings:
    """Everything about scoring that changes the result. Recorded in the ranking.

    Fields with a `help` in their metadata are options of the command line (`commands/groups.py`).

    Raises `UsageError` for numbers out of range; what depends on the method, `methods.registry.configured` checks.
    """

    method: str = field(
        default=DEFAULT_METHOD,
        metadata={
            "panel": "Scoring",
            "help": "curvature, ablation, mixed (heads by ablation, the rest by curvature); fisher (PTF; needs "
            "labels), knowledge (K-prune), reference (OPTIN's released code), for comparison flap, wanda-sp, "
            "depth (whole blocks, ShortGPT), magnitude, random.",
        },
    )
    samples: int = field(default=512, metadata={"least": 1, "help": "Calibration examples."})
    batch_size: int = field(default=32, metadata={"least": 1, "help": "Examples in a batch."})
    max_length: int | None = field(
        default=None, metadata={"least": 1, "help": "Cut texts to this many tokens."}
    )
    rows: int = field(
        default=768, metadata={"least": 1, "help": "Tokens of a batch that enter the relations."}
    )
    """OPTIN's K."""
    probes: int = field(
        default=2, metadata={"least": 1, "panel": "Scoring", "help": "Curvature probes for each batch."}
    )
    rel_error: float | None = field(
        default=None,
        metadata={
            "panel": "Scoring",
            "help": "Probe until the scores' relative error from probing is this (0.1).",
        },
    )
    """The median over units; overrides `probes`."""
    strata: int | None = field(
        default=None,
        metadata={
            "least": 1,
            "panel": "Scoring",
            "help": "curvature: runs of blocks whose features share a backward pass (default: each block has its own "
            "up to 10 blocks, 3 of deeper models).",
        },
    )
    """None: what suits the depth (`CurvatureMethod.shared_passes`)."""
    precision: str = field(
        default="full",
        metadata={
            "panel": "Scoring",
            "help": "full, or reduced: ablation multiplies changes in TF32 or bfloat16.",
        },
    )
    exact_band: float | None = field(
        default=None,
        metadata={
            "panel": "Scoring",
            "help": "Share of the units on either side of the cut to score by ablation.",
        },
    )
    band_flops: float | None = field(
        default=None,
        metadata={"panel": "Scoring", "help": f"Budget whose cut {param('exact_band')} is around."},
    )
    sketch_rows: int = field(
        default=512, metadata={"panel": "Scoring", "help": "Gradients kept for interactions between units."}
    )
    """0 for none."""
    temperature: float | None = field(
        default=None,
        metadata={"panel": "Scoring", "help": "Of the output term (default: 4; knowledge: 2)."},
    )
    output_weight: float | None = field(
        default=None,
        metadata={
            "panel": "Scoring",
            "flag": "lambda",
            "help": "Weight of the output term against the trajectory (default: the budget decides, 0.3 or 0.1, "
            "and 30 for models that write text; knowledge: 0.00025 of the representations; reference: 0.1).",
        },
    )
    """lambda: weight of the output term after both are brought to one median; of `knowledge` that of the
    representational part, of `reference` the paper's. None for the method's default."""
    per_batch: bool = field(
        default=False,
        metadata={
            "panel": "Scoring",
            "help": "fisher: square the mean gradient of each batch, as PTF's code does.",
        },
    )
    head_weight: float = 1.0
    """mu: what `knowledge` multiplies the scores of heads with (K-prune: 64)."""
    tokens: bool = field(
        default=False,
        metadata={
            "panel": "Scoring",
            "help": "Measure what merging tokens costs, too (vision transformers).",
        },
    )
    ranks: bool | None = field(
        default=None,
        metadata={
            "panel": "Scoring",
            "switch": True,
            "help": "Measure what lower ranks of heads cost, too: fewer dimensions in each head of a layer (default: "
            "where there are heads of 16 or more that can be cut).",
        },
    )
    """None: `plan.worth_ranks`."""
    seed: int = field(default=0, metadata={"least": 0, "help": "Seed of everything drawn."})

    def __post_init__(self) -> None:
        check_numbers(type(self), vars(self))
        if self.head_weight <= 0:
            raise UsageError(f"a weight of heads of {self.head_weight:g} is not positive")
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
