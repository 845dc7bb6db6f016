"""What would be scored: model, data, settings, the work it takes, and about how long."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from optin_cli.artefacts.files import digest_json
from optin_cli.data.batches import Batches
from optin_cli.data.examples import Examples, sample
from optin_cli.data.sources import DataSpec
from optin_cli.errors import UsageError
from optin_cli.models.anatomy import Site
from optin_cli.models.checkpoint import OpenModel
from optin_cli.scoring.calibration import Calibration, mean_tokens
from optin_cli.scoring.fisher import read_labels, row_examples
from optin_cli.scoring.methods import METHODS, Method
from optin_cli.scoring.reference import batch_of, scored_sites
from optin_cli.scoring.tokens import boundaries, boundary_name, check_mergeable, levels

ENGINES = {name: method.engines for name, method in METHODS.items() if method.engines}
"""Methods that run the model: which engine scores which kind of unit."""
PRECISIONS = ("full", "reduced")
MOST_PROBES = 4096
Progress = Callable[[float, float, str], None]
"""Called with (work done, all work, what is being done)."""


@dataclass(frozen=True)
class ScoreSettings:
    """Everything about scoring that changes the result. Recorded in the ranking."""

    method: str = "curvature"
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
    """Of the output term; None becomes the method's default."""
    output_weight: float | None = None
    """lambda: weight of the output term after both are brought to one median; of `knowledge` that of the
    representational part, of `reference` the paper's. None becomes the method's default."""
    per_batch: bool = False
    """`fisher` squares the mean gradient of a batch, not the gradient of every example."""
    head_weight: float = 1.0
    """mu: what `knowledge` multiplies the scores of heads with (K-prune: 64)."""
    tokens: bool = False
    """Whether to measure what merging tokens costs, too."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"unknown method {self.method!r}", f"choose one of {', '.join(METHODS)}")
        method = METHODS[self.method]
        if self.temperature is None:
            object.__setattr__(self, "temperature", method.temperature)
        if self.output_weight is None or method.output_weight == 0:
            object.__setattr__(self, "output_weight", method.output_weight)
        if self.per_batch and self.method != "fisher":
            raise UsageError(f"--per-batch is about fisher's gradients; --method {self.method} has none")
        if self.tokens and not method.recombines:
            raise UsageError(
                f"--tokens measures trajectories, and --method {self.method} scores units by something else",
                "use curvature, ablation or mixed",
            )
        if self.head_weight <= 0:
            raise UsageError(f"a weight of heads of {self.head_weight:g} is not positive")
        for name in ("samples", "batch_size", "rows", "probes"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 1 is needed")
        if self.temperature is not None and self.temperature <= 0:
            raise UsageError(f"--temperature {self.temperature:g}: must be positive")
        if self.output_weight is not None and self.output_weight < 0:
            raise UsageError(f"--lambda {self.output_weight:g} is negative")
        if self.precision not in PRECISIONS:
            raise UsageError(f"unknown precision {self.precision!r}", f"use {' or '.join(PRECISIONS)}")
        if self.sketch_rows < 0:
            raise UsageError(f"--sketch-rows {self.sketch_rows} is negative", "0 or --no-sketch keeps none")
        if self.rel_error is not None and not 0 < self.rel_error < 1:
            raise UsageError(f"--rel-error {self.rel_error:g} is not between 0 and 1")
        self._check_band()

    def _check_band(self) -> None:
        if (self.exact_band is None) != (self.band_flops is None):
            raise UsageError(
                "--exact-band needs the budget whose cut it is around, and --band-flops the band",
                "for example --exact-band 0.1 --band-flops 0.6",
            )
        for name in ("exact_band", "band_flops"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UsageError(f"--{name.replace('_', '-')} {value:g} is not a fraction")
        if self.exact_band is not None and "curvature" not in ENGINES.get(self.method, {}).values():
            raise UsageError(
                f"--exact-band re-scores what curvature scored; --method {self.method} has nothing of it"
            )


@dataclass(frozen=True)
class Item:
    """A piece of work that is done whole or not at all; its result is kept when a run is cut short."""

    engine: str
    batch: int
    site: str = ""
    """The one site an ablation is of, or the boundary tokens are merged at; other engines score all they are asked
    for at once."""
    units: tuple[int, ...] = ()
    """Of the site; of a boundary its block."""
    probes: tuple[int, int] = (0, 0)
    """First probe and the one after the last."""
    work: float = field(default=0.0, compare=False)
    """About how many forward passes of one batch it takes."""

    @property
    def key(self) -> str:
        """A file name."""
        parts = [self.engine, str(self.batch)]
        if self.site:
            parts += [self.site, digest_json(self.units)[:12]]
        if self.probes != (0, 0):
            parts += [f"{self.probes[0]}-{self.probes[1]}"]
        return "-".join(parts)


UNITS_PER_ITEM = 192  # some seconds of ablation: lost at a kill, handed to one process of many


@dataclass
class Plan:
    """What would be scored: everything `score` needs, and what `--dry-run` tells."""

    model: OpenModel
    examples: Examples
    calibration: Calibration
    settings: ScoreSettings
    labels: list[Any] | None = None
    """One for each row of the data, for the methods that need them."""

    @property
    def method(self) -> Method:
        return METHODS[self.settings.method]

    def identity(self) -> dict[str, Any]:
        """What makes two scorings the same work."""
        settings = asdict(self.settings)
        settings.pop("output_weight")  # parts are stored apart, so lambda never means scoring again
        if not self.settings.tokens:  # a ranking that has them, too, serves
            settings.pop("tokens")
        if self.model.merges:
            settings["merges"] = self.model.merges
        return {
            "model": self.model.digest,
            "data": self.examples.fingerprint,
            "rows": digest_json(self.examples.row_ids),
            "family": self.model.family.name,
            "task": self.model.task.name,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            **settings,
        }

    def engine(self, site: Site) -> str:
        """The engine that scores a site, '' for methods without one."""
        return self.method.engines.get(site.kind, "")

    def scored_by(self, engine: str) -> list[Site]:
        """The sites that `engine` scores."""
        return [site for site in self.model.anatomy if self.engine(site) == engine]

    def sketched_probes(self) -> int:
        """Probes of each batch whose gradients are kept: whole probes, so that every example counts alike."""
        wanted = -(-self.settings.sketch_rows // self.calibration.batches.count)
        most = MOST_PROBES if self.settings.rel_error is not None else self.settings.probes
        return min(wanted, most)

    def items(self) -> list[Item]:
        """All work that is known from the start; with `rel_error` curvature adds probes as needed."""
        found = []
        for batch in range(len(self.calibration)):
            for site in self.scored_by("ablation"):
                found += self.ablation_items(batch, site, np.arange(site.units))
            if self.scored_by("fisher"):
                found.append(Item("fisher", batch, probes=(0, 1), work=3.0))
            if self.scored_by("knowledge"):
                probes = self.settings.probes
                found.append(Item("knowledge", batch, probes=(0, probes), work=1.0 + 1.5 * probes))
        for site in scored_sites(self.model) if self.scored_by("reference") else ():
            batch = batch_of(site, len(self.calibration))
            found += self.ablation_items(batch, site, np.arange(site.units), "reference")
        if self.settings.rel_error is None:
            found += self.probe_items(0, self.settings.probes)
        return found + self.token_items()

    @cached_property
    def token_levels(self) -> list[int]:
        """How many tokens are merged behind a block, in the measurements of what merging costs."""
        return levels(round(mean_tokens(self.calibration)), self.model.anatomy.prefix)

    def token_items(self) -> list[Item]:
        """One measurement for each batch and boundary."""
        if not self.settings.tokens:
            return []
        return [
            Item("tokens", batch, boundary_name(block), (block,), work=float(len(self.token_levels)))
            for batch in range(len(self.calibration))
            for block in boundaries(self.model.anatomy)
        ]

    def weight(self, item: Item) -> float:
        """The share of a site's score that comes from an item's batch."""
        return 1.0 if item.engine == "reference" else self.calibration.weight(item.batch)

    def row_examples(self, batch: int) -> list[int]:
        """The example that each kept gradient of one probe is of."""
        ids = self.calibration.batches.ids(batch)
        if self.settings.method != "fisher":
            return ids
        return row_examples(ids, self.calibration.batches.together, self.settings.per_batch)

    def probe_items(self, first: int, stop: int) -> list[Item]:
        """Probes `first`..`stop` of every batch."""
        if not self.scored_by("curvature"):
            return []
        depth = len(self.model.anatomy.blocks)
        # a backward pass from every block's feature and from the output, each through what lies before it
        each = 1.5 * ((depth + 1) / 2 + 1)
        return [
            Item("curvature", batch, probes=(first, stop), work=(stop - first) * each)
            for batch in range(len(self.calibration))
        ]

    def ablation_items(
        self, batch: int, site: Site, units: np.ndarray, engine: str = "ablation"
    ) -> list[Item]:
        """Ablation of some units of a site on one batch, in parts."""
        depth = len(self.model.anatomy.blocks)
        each = (depth - site.block) / depth / 2  # only the deeper blocks run, on hardly any padding
        return [
            Item(engine, batch, site.name, tuple(part.tolist()), work=each * len(part))
            for part in (
                units[start : start + UNITS_PER_ITEM] for start in range(0, len(units), UNITS_PER_ITEM)
            )
        ]


def make_plan(model: OpenModel, data: DataSpec, settings: ScoreSettings, memory: int | None = None) -> Plan:
    """Open the data and fix the calibration; `memory` bounds the engines in bytes. Raises what data and settings
    raise."""
    method = METHODS[settings.method]
    unknown = {site.kind for site in model.anatomy} - set(method.engines)
    if method.engines and unknown:
        raise UsageError(
            f"--method {settings.method} does not score {' and '.join(sorted(unknown))}, which {model.spec} has",
            "use curvature, ablation, mixed, fisher or magnitude",
        )
    blocks = model.anatomy.blocks
    if settings.method == "reference" and len(set(blocks)) < len(blocks):
        raise UsageError(
            f"--method reference does not score {model.spec}, whose blocks share their weights",
            "use curvature, ablation, mixed, knowledge, fisher or magnitude",
        )
    if settings.tokens:
        check_mergeable(model.anatomy, model.spec)
    examples = sample(
        data,
        model.family.modality,
        settings.samples,
        settings.seed,
        reader=model.task.reader,
    )
    batches = Batches(
        examples,
        model.processor,
        settings.batch_size,
        max_length=settings.max_length,
        reader=model.task.reader,
        together=method.labels,
        # PTF's batches are random: texts of one length are more alike
        shuffle=settings.seed if method.shuffled or settings.per_batch else None,
    )
    labels = read_labels(model, batches) if method.labels else None
    calibration = Calibration(
        model, batches, settings.rows, settings.temperature or method.temperature, settings.seed, memory
    )
    return Plan(model, examples, calibration, settings, labels)


def estimate_seconds(plan: Plan) -> float:
    """About how long scoring will take: one call of each kind of work is timed on the middle batch."""
    with plan.model.unmerged():
        return _timed(plan)


def _timed(plan: Plan) -> float:
    from optin_cli.scoring.work import Worker

    middle = len(plan.calibration) // 2
    items = plan.items()
    worker, seconds = Worker(plan), 0.0
    for engine in dict.fromkeys(item.engine for item in items):
        same = [item for item in items if item.engine == engine]
        here = [item for item in same if item.batch == middle] or same
        # the dearest and the cheapest: the cost of an ablation falls with depth
        timed = [_shortened(here[0]), _shortened(here[-1])]
        for item in timed:
            worker.run(item)  # the first call also pays for warming up
            started = time.perf_counter()
            worker.run(item)
            each = (time.perf_counter() - started) / item.work
            seconds += each * sum(i.work for i in same) / len(timed)
    return seconds


def _shortened(item: Item) -> Item:
    """A small part of an item."""
    if item.units:
        units = item.units[:16]
        return Item(item.engine, item.batch, item.site, units, work=item.work * len(units) / len(item.units))
    first, stop = item.probes
    return Item(item.engine, item.batch, probes=(first, first + 1), work=item.work / max(1, stop - first))
