"""`score`: run the engines over the calibration batches and write the ranking. Resumable at every batch."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from optin_cli.artefacts.partial import Partial
from optin_cli.artefacts.provenance import library_versions
from optin_cli.artefacts.ranking import RankedSite, Ranking, combine, read_ranking, write_ranking
from optin_cli.errors import ArtefactError, UsageError
from optin_cli.models.anatomy import Site
from optin_cli.models.macs import count_macs
from optin_cli.scoring.ablation import Ablation
from optin_cli.scoring.baselines import magnitude, random_scores
from optin_cli.scoring.calibration import Scores, mean_tokens, measured_blocks
from optin_cli.scoring.curvature import curvature
from optin_cli.scoring.plan import ENGINES, PROBE_WORK, Plan, Progress


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
        versions=library_versions(),
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
                on_probe=lambda n: advance(n * PROBE_WORK, f"{label}, curvature"),
            )
            stored = {f"{n}/{p}": a for n, pair in found.items() for p, a in zip("to", pair, strict=True)}
            partial.put(key, stored)
        else:
            advance(plan.settings.probes * PROBE_WORK, label)
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
