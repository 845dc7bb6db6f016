"""`score`: run the engines over the calibration batches and write the ranking. Resumable at every batch."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from optin_cli.artefacts.files import check_space
from optin_cli.artefacts.partial import Partial, clear_parts
from optin_cli.artefacts.provenance import library_versions
from optin_cli.artefacts.ranking import RankedSite, Ranking, own_output_weight, read_ranking, write_ranking
from optin_cli.errors import ArtefactError, UsageError
from optin_cli.models.anatomy import Site
from optin_cli.models.macs import count_macs
from optin_cli.models.precision import exact_convolutions
from optin_cli.scoring.band import near_the_cut
from optin_cli.scoring.baselines import magnitude, random_scores
from optin_cli.scoring.calibration import mean_tokens
from optin_cli.scoring.plan import ENGINES, MOST_PROBES, Item, Plan, Progress
from optin_cli.scoring.team import Team
from optin_cli.scoring.work import Arrays, Totals, Worker

log = logging.getLogger("optin")


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
    # the weights of a model may be those of one that merges other tokens
    differs = [key for key in {**wanted, "merges": None} if have.get(key) != wanted.get(key)]
    if differs:
        raise UsageError(f"{path} exists, made with other settings: {', '.join(differs)}", redo)
    if not any_lambda and ranking.settings["output_weight"] != plan.settings.output_weight:
        raise UsageError(
            f"{path} holds these scores, combined with lambda {own_output_weight(ranking):g}",
            "`optin select --lambda` recombines them without scoring; or choose another name, or --force"
            if plan.method.recombines
            else redo,
        )
    clear_parts(path)  # left by a run that was killed just after it wrote the ranking
    return ranking


def score(
    plan: Plan,
    output: Path,
    on_progress: Progress = lambda *_: None,
    team: Team | None = None,
) -> Ranking:
    """Score every unit of the plan's model and write the ranking to `output`, atomically.

    Finished items are kept beside `output` until then: a killed run resumes when called again. With a `team` every
    process calls this and the first one writes; all return the same ranking. Raises `ArtefactError` when the
    processes don't agree on what they do. A model that merges tokens is scored on whole sequences.
    """
    with plan.model.unmerged(), exact_convolutions():
        return _scored(plan, output, on_progress, team or Team())


def _scored(plan: Plan, output: Path, on_progress: Progress, team: Team) -> Ranking:
    team.check_same(plan.identity())
    started = time.perf_counter()
    tokens = mean_tokens(plan.calibration)
    run, sketch, token_sites = None, None, []
    if plan.settings.method in ENGINES:
        run = _Run(plan, output, team, on_progress)
        totals = run.finish(tokens)
        sites = [
            _ranked(site, *totals.parts(site.name), totals.columns[site.name]) for site in plan.model.anatomy
        ]
        scores = plan.method.combine(sites, plan.settings)
        for site in sites:
            site.score = scores[site.name]
        sketch = totals.sketch()
        token_sites = totals.token_sites()
        probes = totals.probes
    else:
        sites, probes = _baseline(plan, tokens), 0
    ranking = Ranking(
        model={
            "id": plan.model.spec,
            "digest": plan.model.digest,
            "family": plan.model.family.name,
            "task": plan.model.task.name,
            "class": type(plan.model.module).__name__,
            **({"merges": plan.model.merges} if plan.model.merges else {}),
            **(
                {"chained": chained} if (chained := [s.name for s in plan.model.anatomy if s.chained]) else {}
            ),
            **({"shared": shared} if (shared := list(map(asdict, plan.model.anatomy.shared))) else {}),
            **({"prefix": plan.model.anatomy.prefix} if plan.model.anatomy.tokens else {}),
        },
        data=plan.examples.describe(),
        row_ids=plan.examples.row_ids,
        method=plan.settings.method,
        settings={
            **asdict(plan.settings),
            "engines": plan.method.engines,
            "recombines": plan.method.recombines,
            "feature_weights": plan.method.feature_weights,
            "probed": probes,
            "identity": plan.identity(),
        },
        tokens=tokens,
        dense={**plan.model.dense, "fixed_macs": _fixed_macs(plan)},
        sites=sites,
        token_sites=token_sites,
        batch_weights=[plan.calibration.weight(b) for b in range(len(plan.calibration))],
        device=_device_name(plan.model.device),
        dtype=str(plan.model.dtype).removeprefix("torch."),
        versions=library_versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - started, 3),
    )
    if team.leads:
        if sketch is not None:
            check_space(output, sketch.nbytes)
        write_ranking(output, ranking, sketch)
    ranking = team.told(ranking)
    if run is not None:  # only now: whoever failed before this finds the finished items again
        run.partial.discard()
    return ranking


class _Run:
    """All items of a plan, done by a team, resumable."""

    def __init__(self, plan: Plan, output: Path, team: Team, on_progress: Progress) -> None:
        self.plan = plan
        self.team = team
        self.on_progress = on_progress
        self.worker = Worker(plan)
        self.totals = Totals(plan)
        if team.leads:  # it clears what another plan left, before anyone adds to it
            self.partial = Partial(output, plan.identity())
            # once in the parts, once in the ranking: better told now than after hours of work
            check_space(output, 2 * _sketch_bytes(plan) - self.partial.nbytes())
        team.told(None)
        if not team.leads:
            self.partial = Partial(output, plan.identity(), announce=False)
        self.done = self.total = 0.0

    def finish(self, tokens: float) -> Totals:
        self._do(self.plan.items())
        self._probe_on()
        self._do(self._band(tokens))
        return self.totals

    def _do(self, items: list[Item]) -> None:
        """Do the items; the leader's totals have all of them, in their order, whoever did them and when."""
        self.total += sum(item.work for item in items)
        found: dict[str, Arrays] = {}
        if self.team.leads:
            for item in items:
                if (stored := self.partial.get(item.key)) is not None:
                    found[item.key] = stored
                    self._advance(item.work, "parts of an earlier run")
        # what is left is shared, not all: one process may have done the whole first half
        left = self.team.told([item for item in items if item.key not in found])
        for item in self.team.share(left):
            self.team.check_others()
            found[item.key] = self._one(item)
        if self.team.leads and self.team.size > 1:
            self.on_progress(self.done, self.total, "waiting for the other processes")
        everything = {key: arrays for part in self.team.gather(found) for key, arrays in part.items()}
        if self.team.leads:
            for item in items:
                self.totals.add(item, everything[item.key])
            self._advance(self.total - self.done, "done")

    def _one(self, item: Item) -> Arrays:
        label = f"batch {item.batch + 1}/{len(self.plan.calibration)}, {item.site or item.engine}"
        told = 0.0

        def tell(work: float) -> None:
            nonlocal told
            told += work
            self._advance(work * self.team.size, label)  # the others do as much in the meantime

        found = self.worker.run(item, tell)
        self.partial.put(item.key, found)
        self._advance((item.work - told) * self.team.size, label)
        return found

    def _advance(self, work: float, label: str) -> None:
        self.done = min(self.done + work, self.total)
        if self.team.leads:
            self.on_progress(self.done, self.total, label)

    def _probe_on(self) -> None:
        """Probe until the relative error is reached: it falls with the root of the number of probes."""
        target = self.plan.settings.rel_error
        if target is None or not self.plan.scored_by("curvature"):
            return
        done, wanted = 0, 2  # the scatter of one probe can't be told
        while done < wanted:
            for probe in range(done, wanted):
                self._do(self.plan.probe_items(probe, probe + 1))
            done = wanted
            error = self.team.told(self.totals.probing_error() if self.team.leads else None)
            if error > target:
                wanted = min(max(done + 1, round(0.8 * done * (error / target) ** 2)), 2 * done, MOST_PROBES)
        log.info("%d probes a batch: the scores' relative error from probing is %.3f", done, error)

    def _band(self, tokens: float) -> list[Item]:
        """Ablation items of the units near the cut."""
        settings, anatomy = self.plan.settings, list(self.plan.model.anatomy)
        if settings.exact_band is None or settings.band_flops is None:
            return []
        near: dict[str, np.ndarray] | None = None
        if self.team.leads:
            sites = [_ranked(s, *self.totals.parts(s.name), self.totals.columns[s.name]) for s in anatomy]
            scores = self.plan.method.combine(sites, settings)
            near = near_the_cut(anatomy, scores, settings.band_flops, settings.exact_band, tokens)
        near = self.team.told(near)
        return [
            item
            for batch in range(len(self.plan.calibration))
            for site in self.plan.scored_by("curvature")
            for item in self.plan.ablation_items(batch, site, near[site.name])
        ]


def _sketch_bytes(plan: Plan) -> int:
    """Size of the sketch to be kept."""
    engines = set(plan.method.engines.values())
    parts = 2 if "curvature" in engines else len(engines & {"fisher", "knowledge"})
    rows = plan.sketched_probes() * plan.calibration.batches.count
    return rows * sum(site.units for site in plan.model.anatomy) * parts * np.float32().nbytes


def _baseline(plan: Plan, tokens: float) -> list[RankedSite]:
    anatomy = plan.model.anatomy
    if plan.settings.method == "magnitude":
        scores = magnitude(plan.model.module, anatomy)
    else:
        scores = random_scores(anatomy, tokens, plan.settings.seed)
    nothing = np.zeros((0, 0, 2), np.float32)
    sites = [_ranked(s, np.zeros((s.units, 0)), np.zeros(s.units), nothing, []) for s in anatomy]
    for site in sites:
        site.score = scores[site.name]
    return sites


def _ranked(
    site: Site, trajectory: np.ndarray, output: np.ndarray, by_batch: np.ndarray, columns: list[int]
) -> RankedSite:
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
        by_batch=by_batch,
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
