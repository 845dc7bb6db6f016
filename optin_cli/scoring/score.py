"""`score`: run the engines over the calibration batches and write the ranking. Resumable at every batch."""

from __future__ import annotations

import functools
import logging
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from optin_cli.artefacts.files import digest_json
from optin_cli.artefacts.partial import Partial
from optin_cli.artefacts.ranking import RankedSite, Ranking, combine, read_ranking, write_ranking
from optin_cli.data.batches import Batches
from optin_cli.data.examples import Examples, sample
from optin_cli.data.sources import DataSpec
from optin_cli.errors import ArtefactError, UsageError
from optin_cli.models.anatomy import HEADS, NEURONS, Site
from optin_cli.models.checkpoint import OpenModel
from optin_cli.models.macs import count_macs
from optin_cli.models.tasks import EMBEDDING
from optin_cli.scoring.ablation import Ablation, Scores
from optin_cli.scoring.baselines import magnitude, random_scores
from optin_cli.scoring.calibration import Calibration, mean_tokens, measured_blocks
from optin_cli.scoring.curvature import curvature

log = logging.getLogger("optin")

ENGINES = {
    "auto": {HEADS: "ablation", NEURONS: "curvature"},
    "ablation": {HEADS: "ablation", NEURONS: "ablation"},
    "curvature": {HEADS: "curvature", NEURONS: "curvature"},
}
METHODS = (*ENGINES, "magnitude", "random")
_PROBE_WORK = 4.0  # a probe is three backward passes, of which one stays inside the blocks
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
        return len(self.calibration) * (ablated + self.settings.probes * _PROBE_WORK * probed)

    def unit_work(self, site: Site) -> float:
        """Forward passes that ablating one unit of `site` takes: only its own and the deeper blocks run."""
        depth = len(self.model.anatomy.blocks)
        return (depth - site.block) / depth

    def engine(self, site: Site) -> str:
        """`ablation`, `curvature`, or '' for methods without one."""
        return ENGINES.get(self.settings.method, {}).get(site.kind, "")


def plan(model: OpenModel, data: DataSpec, settings: ScoreSettings) -> Plan:
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


def existing(path: Path, plan: Plan, *, any_lambda: bool = False) -> Ranking | None:
    """The ranking already at `path` if it is the one this plan would make; None if there is no file.

    `any_lambda` accepts scores combined with another lambda: their parts are the same. Raises `UsageError` when
    the file is something else, naming what differs.
    """
    if not path.exists():
        return None
    redo = "choose another name, or --force to replace it"
    try:
        ranking = read_ranking(path)
    except ArtefactError as error:
        raise UsageError(f"{path} exists and is no readable ranking ({error.what})", redo) from error
    wanted, have = plan.identity(), ranking.settings["identity"]
    differs = [key for key in wanted if have.get(key) != wanted[key]]
    if differs:
        raise UsageError(f"{path} exists, made with another {', '.join(differs)}", redo)
    if not any_lambda and ranking.settings["output_weight"] != plan.settings.output_weight:
        raise UsageError(
            f"{path} holds these scores, combined with lambda {ranking.settings['output_weight']:g}",
            "`optin select --lambda` recombines them without scoring; or choose another name, or --force",
        )
    return ranking


def score(plan: Plan, output: Path, on_progress: Progress = lambda *_: None) -> Ranking:
    """Score every unit of the plan's model and write the ranking to `output`, atomically.

    Finished batches are kept beside `output` until then: a killed run resumes when called again.
    """
    started = time.perf_counter()
    tokens = mean_tokens(plan.calibration)
    partial = Partial(output, plan.identity())
    if plan.settings.method in ENGINES:
        parts, columns = _trajectories(plan, partial, on_progress)
        sites = [_ranked(site, *parts[site.name], columns[site.name]) for site in plan.model.anatomy]
        for name, scores in combine(sites, plan.settings.output_weight).items():
            next(s for s in sites if s.name == name).score = scores
    else:
        sites = _baseline(plan, tokens)
    ranking = Ranking(
        model={
            "id": plan.model.spec,
            "digest": plan.model.digest,
            "family": plan.model.family.name,
            "task": plan.model.task.name,
            "class": type(plan.model.module).__name__,
        },
        data=plan.examples.describe(),
        row_ids=plan.examples.row_ids,
        method=plan.settings.method,
        settings={
            **asdict(plan.settings),
            "engines": ENGINES.get(plan.settings.method, {}),
            "identity": plan.identity(),
        },
        tokens=tokens,
        dense={**plan.model.dense, "fixed_macs": _fixed_macs(plan)},
        sites=sites,
        device=_device_name(plan.model.device),
        dtype=str(plan.model.dtype).removeprefix("torch."),
        versions=_versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - started, 3),
    )
    write_ranking(output, ranking)
    partial.discard()
    return ranking


def _trajectories(
    plan: Plan, partial: Partial, on_progress: Progress
) -> tuple[dict[str, Scores], dict[str, list[int]]]:
    """Parts of the scores of every site, averaged over the batches, and what their columns mean."""
    engines = ENGINES[plan.settings.method]
    total, done = plan.work(), 0.0
    sums: dict[str, list[np.ndarray]] = {}

    def advance(amount: float, what: str) -> None:
        nonlocal done
        done += amount
        on_progress(done, total, what)

    for index in range(len(plan.calibration)):
        parts = _batch_parts(plan, index, engines, partial, advance)
        weight = plan.calibration.weight(index)
        for name, (trajectory, output) in parts.items():
            old = sums.setdefault(name, [np.zeros_like(trajectory), np.zeros_like(output)])
            old[0] += weight * trajectory
            old[1] += weight * output
    depth = len(plan.model.anatomy.blocks)
    columns = {
        s.name: [-1] if engines[s.kind] == "curvature" else measured_blocks(s, depth)
        for s in plan.model.anatomy
    }
    return {name: (t, o) for name, (t, o) in sums.items()}, columns


def _batch_parts(
    plan: Plan,
    index: int,
    engines: dict[str, str],
    partial: Partial,
    advance: Callable[[float, str], None],
) -> dict[str, Scores]:
    """Parts of the scores on one batch; finished items come from `partial`."""
    label = f"batch {index + 1}/{len(plan.calibration)}"
    parts: dict[str, Scores] = {}
    if "curvature" in engines.values():
        key = f"curvature-{index}"
        stored = partial.get(key)
        if stored is None:
            found = curvature(
                plan.calibration,
                index,
                plan.settings.probes,
                [s for s in plan.model.anatomy if plan.engine(s) == "curvature"],
                on_probe=lambda n: advance(n * _PROBE_WORK, f"{label}, curvature"),
            )
            stored = {f"{n}/{p}": a for n, pair in found.items() for p, a in zip("to", pair, strict=True)}
            partial.put(key, stored)
        else:
            advance(plan.settings.probes * _PROBE_WORK, label)
        for name in {key.rpartition("/")[0] for key in stored}:
            parts[name] = stored[f"{name}/t"], stored[f"{name}/o"]
    ablation: Ablation | None = None
    for site in plan.model.anatomy:
        if engines[site.kind] != "ablation":
            continue
        key = f"ablation-{index}-{site.name}"
        stored = partial.get(key)
        if stored is None:
            ablation = ablation or Ablation(plan.calibration, index)
            what = f"{label}, {site.name}"
            trajectory, output = ablation.score(
                site, functools.partial(_tell, advance, what, plan.unit_work(site))
            )
            stored = {"t": trajectory, "o": output}
            partial.put(key, stored)
        else:
            advance(site.units * plan.unit_work(site), label)
        parts[site.name] = stored["t"], stored["o"]
    return parts


def _tell(advance: Callable[[float, str], None], what: str, each: float, units: int) -> None:
    advance(units * each, what)


def _baseline(plan: Plan, tokens: float) -> list[RankedSite]:
    anatomy = plan.model.anatomy
    if plan.settings.method == "magnitude":
        scores = magnitude(plan.model.module, anatomy)
    else:
        scores = random_scores(anatomy, tokens, plan.settings.seed)
    sites = [_ranked(s, np.zeros((s.units, 0)), np.zeros(s.units), []) for s in anatomy]
    for site in sites:
        site.score = scores[site.name]
    return sites


def _ranked(site: Site, trajectory: np.ndarray, output: np.ndarray, columns: list[int]) -> RankedSite:
    return RankedSite(
        name=site.name,
        kind=site.kind,
        block=site.block,
        units=site.units,
        width=site.width,
        macs_per_token=site.macs_per_token,
        macs_per_pair=site.macs_per_pair,
        params_per_unit=site.params_per_unit,
        score=np.zeros(site.units),
        trajectory=trajectory,
        output=output,
        columns=columns,
    )


def _fixed_macs(plan: Plan) -> int:
    """MACs outside the sites on one example of about the mean length: embeddings, patches, pooler, head."""
    middle = plan.calibration.batch(len(plan.calibration) // 2)
    inputs = {key: value[:1] for key, value in middle.inputs.items()}
    tokens = (
        middle.inputs["input_ids"].shape[1] if "input_ids" in middle.inputs else mean_tokens(plan.calibration)
    )
    return max(0, round(count_macs(plan.model, inputs) - plan.model.anatomy.macs(tokens)))


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} threads)"


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("optin", "torch", "transformers", "timm", "datasets", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
