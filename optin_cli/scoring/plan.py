"""What would be scored: model, data, settings, the work it takes, and about how long."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from optin_cli.artefacts.files import digest_json
from optin_cli.data.batches import Batches
from optin_cli.data.examples import Examples, sample
from optin_cli.data.sources import DataSpec
from optin_cli.errors import UsageError
from optin_cli.models.anatomy import HEADS, NEURONS, Site
from optin_cli.models.checkpoint import OpenModel
from optin_cli.models.tasks import EMBEDDING
from optin_cli.scoring.ablation import Ablation
from optin_cli.scoring.calibration import Calibration
from optin_cli.scoring.curvature import curvature

ENGINES = {
    "auto": {HEADS: "ablation", NEURONS: "curvature"},
    "ablation": {HEADS: "ablation", NEURONS: "ablation"},
    "curvature": {HEADS: "curvature", NEURONS: "curvature"},
}
METHODS = (*ENGINES, "magnitude", "random")
PROBE_WORK = 4.0  # a probe is three backward passes, of which one stays inside the blocks
Progress = Callable[[float, float, str], None]
"""Called with (work done, all work, what is being done)."""


@dataclass(frozen=True)
class ScoreSettings:
    """Everything about scoring that changes the result. Recorded in the ranking."""

    method: str = "auto"
    samples: int = 512
    batch_size: int = 32
    max_length: int | None = None
    rows: int = 768
    """Tokens of a batch that enter the relations (OPTIN's K)."""
    probes: int = 4
    """Curvature probes for each batch."""
    temperature: float = 4.0
    """Of the output term."""
    output_weight: float = 1.0
    """lambda: weight of the output term after both are brought to one median."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"unknown method {self.method!r}", f"choose one of {', '.join(METHODS)}")
        for name in ("samples", "batch_size", "rows", "probes"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 1 is needed")
        if self.temperature <= 0:
            raise UsageError(f"--temperature {self.temperature:g}: must be positive")
        if self.output_weight < 0:
            raise UsageError(f"--lambda {self.output_weight:g} is negative")


@dataclass
class Plan:
    """What would be scored: everything `score` needs, and what `--dry-run` tells."""

    model: OpenModel
    examples: Examples
    calibration: Calibration
    settings: ScoreSettings

    def identity(self) -> dict[str, Any]:
        """What makes two scorings the same work."""
        settings = asdict(self.settings)
        settings.pop("output_weight")  # parts are stored apart, so lambda never means scoring again
        return {
            "model": self.model.digest,
            "data": self.examples.fingerprint,
            "rows": digest_json(self.examples.row_ids),
            "family": self.model.family.name,
            "task": self.model.task.name,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            **settings,
        }

    def work(self) -> float:
        """Everything that progress counts, in forward passes of one batch."""
        ablated = sum(s.units * self.unit_work(s) for s in self.model.anatomy if self.engine(s) == "ablation")
        probed = any(self.engine(s) == "curvature" for s in self.model.anatomy)
        return len(self.calibration) * (ablated + self.settings.probes * PROBE_WORK * probed)

    def unit_work(self, site: Site) -> float:
        """Forward passes that ablating one unit of `site` takes: only its own and the deeper blocks run."""
        depth = len(self.model.anatomy.blocks)
        return (depth - site.block) / depth

    def engine(self, site: Site) -> str:
        """`ablation`, `curvature`, or '' for methods without one."""
        return ENGINES.get(self.settings.method, {}).get(site.kind, "")


def make_plan(model: OpenModel, data: DataSpec, settings: ScoreSettings) -> Plan:
    """Open the data and fix the calibration. Raises what data and settings raise."""
    examples = sample(
        data,
        model.family.modality,
        settings.samples,
        settings.seed,
        separate=model.task.name == EMBEDDING,
    )
    batches = Batches(
        examples,
        model.processor,
        settings.batch_size,
        max_length=settings.max_length,
        separate=model.task.name == EMBEDDING,
    )
    calibration = Calibration(model, batches, settings.rows, settings.temperature, settings.seed)
    return Plan(model, examples, calibration, settings)


def estimate_seconds(plan: Plan) -> float:
    """About how long scoring will take: one call of each kind of work is timed on the middle batch."""
    middle = len(plan.calibration) // 2
    seconds = 0.0
    probed = [s for s in plan.model.anatomy if plan.engine(s) == "curvature"]
    if probed:
        started = time.perf_counter()
        curvature(plan.calibration, middle, 1, probed)
        seconds += (time.perf_counter() - started) * plan.settings.probes
    ablated = [s for s in plan.model.anatomy if plan.engine(s) == "ablation" and s.units]
    if ablated:
        ablation = Ablation(plan.calibration, middle)
        limit = ablation.variants_per_call()
        for site in (ablated[0], ablated[-1]):  # the dearest and the cheapest: cost falls with depth
            started = time.perf_counter()
            ablation.score(site, limit=limit)
            each = (time.perf_counter() - started) / min(limit, site.units)
            seconds += each * sum(s.units for s in ablated) / 2
    return seconds * len(plan.calibration)
