"""`score`: run the engines over the calibration batches and write the ranking. Resumable at every batch."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from optin_cli.architectures.config_sizes import sized_by_config
from optin_cli.artefacts.changes import Change, changes, explain, explain_new
from optin_cli.artefacts.facts import ModelFacts
from optin_cli.artefacts.files import atomic_file, check_space
from optin_cli.artefacts.partial import Busy, Partial, clear_parts
from optin_cli.artefacts.provenance import library_versions
from optin_cli.artefacts.ranking import RankedSite, Ranking, read_ranking, write_ranking
from optin_cli.artefacts.rankings import rankings
from optin_cli.artefacts.site_losses import SiteLosses
from optin_cli.data.lengths import warn_if_short
from optin_cli.data.likeness import content_of
from optin_cli.errors import ArtefactError, InputError, OutputDiffers, UsageError, param
from optin_cli.execution.allocator import freed_memory_kept
from optin_cli.execution.macs import count_macs
from optin_cli.execution.precision import exact_convolutions
from optin_cli.importance import AUTO, auto_weighting, own_output_weight
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.scoring.calibration import mean_tokens
from optin_cli.scoring.distributed import Team
from optin_cli.scoring.methods.base import Arrays, Item, ScoringMethod
from optin_cli.scoring.plan import Plan, Progress
from optin_cli.scoring.runner import Worker
from optin_cli.structure.anatomy import BESIDE, DIMENSIONS, SUBLAYERS

log = logging.getLogger("optin")
_POLL, _BEGINNING = 0.5, 5.0
"""Seconds between two looks at another run's lock, and for which its work may be without its stamp."""
_LAMBDA = "lambda"
_NO_SKETCH = (
    f"leave the sketch out ({param('sketch', False, python='sketch_rows=0')}), or give a smaller "
    f"{param('sketch_rows')}"
)


def existing(path: Path, plan: Plan, *, any_lambda: bool = False) -> Ranking | None:
    """Return the ranking already at `path` if it is the one this plan would make; None if there is no file.

    `any_lambda` accepts scores combined with another lambda: their parts are the same. Raises `UsageError` when
    the file is something else, naming what differs.
    """
    if not path.exists():
        explain_new(path)
        return None
    redo = f"choose another name, or {param('force', True)} to replace it"
    try:
        ranking = read_ranking(path)
    except ArtefactError as error:
        raise UsageError(
            f"{path} exists and is not a readable ranking ({error.template[0]})", redo
        ) from error
    differs = _differences(ranking, plan, any_lambda=any_lambda)
    explain(path, differs, plan.identity())
    if names := [change.name for change in differs if change.name != _LAMBDA]:
        raise OutputDiffers(f"{path} exists, made with other settings: {', '.join(names)}", redo)
    if differs:
        raise OutputDiffers(
            f"{path} holds these scores, combined with lambda {own_output_weight(ranking):g}",
            "`optin select --lambda` recombines them without scoring; or choose another name, or "
            f"{param('force', True)}"
            if plan.method.recombines
            else redo,
        )
    clear_parts(path)  # left by a run that was killed just after it wrote the ranking
    return ranking


def matching(plan: Plan, where: Iterable[tuple[str, Path]]) -> tuple[str, Path, Ranking] | None:
    """(place, path, ranking) of the first ranking in the places that this plan would make; None if there is none."""
    for one in rankings(where, naming=plan.model.digest):
        if one.ranking is None:
            continue
        differs = _differences(one.ranking, plan)
        explain(one.path, differs, plan.identity())
        if not differs:
            return one.place, one.path, one.ranking
    return None


def copy_ranking(source: Path, output: Path) -> None:
    """Copy a ranking's file to `output`: the whole file or nothing."""
    with atomic_file(output) as temporary:
        shutil.copyfile(source, temporary)


def _differences(ranking: Ranking, plan: Plan, *, any_lambda: bool = False) -> list[Change]:
    """The inputs of a ranking that are not the plan's. `any_lambda` accepts scores combined with another one."""
    wanted, have = plan.identity(), ranking.settings.get("identity", {})
    # the weights of a model may be those of one that merges other tokens
    differs = changes(have, wanted, {**wanted, "merges": None})
    if any_lambda:
        return differs
    own, weight = ranking.settings.get("output_weight"), plan.settings.output_weight
    return differs + changes({_LAMBDA: own}, {_LAMBDA: weight})


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
    return score_once(plan, output, on_progress, team)[0]


def score_once(
    plan: Plan,
    output: Path,
    on_progress: Progress = lambda *_: None,
    team: Team | None = None,
) -> tuple[Ranking, bool]:
    """`score`, and whether another run made the ranking: one that does the same work at the same time is waited for.

    Raises `UsageError` where another run is scoring something else to `output`.
    """
    team = team or Team()
    identity = plan.identity()
    team.check_same(identity)
    partial, found = _claimed(plan, identity, output, on_progress) if team.leads else (None, None)
    found = team.broadcast(found)
    if found is not None:
        return found, True
    with plan.model.unmerged(), exact_convolutions(), freed_memory_kept():
        started = time.perf_counter()
        try:
            run = _Run(plan, identity, output, team, on_progress, partial)
            return _written(run, plan, identity, output, team, started), False
        finally:
            if partial is not None:
                partial.close()


def _claimed(
    plan: Plan, identity: dict[str, Any], output: Path, on_progress: Progress
) -> tuple[Partial | None, Ranking | None]:
    """The unfinished work, for this run alone; or the ranking that another run has made of it in the meantime."""
    last_same = time.monotonic()
    waited = False
    while True:
        try:
            partial = Partial(output, identity)
        except Busy as other:
            # a run that begins is not stamped yet, or still with the run before; one that ends no longer
            if other.same:
                last_same = time.monotonic()
            elif time.monotonic() - last_same > _BEGINNING:
                raise
            if not waited:
                log.info("waiting for %s, which scores to %s", other.owner, output)
            waited = True
            on_progress(0, 1, f"waiting for {other.owner}")
            time.sleep(_POLL)
            continue
        try:
            found = existing(output, plan) if waited else None
        except UsageError:  # it was something else
            found = None
        if found is None:
            return partial, None
        log.info("taking %s as another run has just made it", output)
        partial.discard()
        partial.close()
        return None, found


def _written(
    run: _Run, plan: Plan, identity: dict[str, Any], output: Path, team: Team, started: float
) -> Ranking:
    """Do what is left of a run and write its ranking."""
    worker = run.finish()
    everything = worker.totals.sites()
    sites = [site for site in everything if site.kind not in BESIDE]
    scores = worker.method.combine(sites)
    for site in sites:
        site.score = scores[site.name]
    if team.leads:
        _check_finite(everything, plan)
    sketch, lengths = worker.totals.sketch(), plan.lengths
    ranking = Ranking(
        model=_model_facts(plan.model),
        data={
            **plan.examples.describe(),
            "lengths": lengths,
            "content": content_of(plan.calibration.batches),
        },
        row_ids=plan.examples.row_ids,
        method=plan.settings.method,
        settings={
            **asdict(plan.settings),
            "engines": plan.method.engines(),
            "recombines": plan.method.recombines,
            "feature_weights": plan.method.feature_weights,
            **({"weighting": _weighting(plan, sites)} if plan.method.feature_weights == AUTO else {}),
            **({"whole_blocks": True} if plan.method.whole_blocks else {}),
            "probed": worker.totals.probes,
            "identity": identity,
        },
        tokens=mean_tokens(plan.calibration),
        dense=plan.model.dense | {"fixed_macs": _fixed_macs(plan)},
        sites=sites,
        token_sites=worker.token_sites(),
        rank_sites=_losses(everything, DIMENSIONS),
        sublayers=_losses(everything, SUBLAYERS),
        batch_weights=[plan.calibration.weight(b) for b in range(len(plan.calibration))],
        device=_device_name(plan.model.device),
        dtype=plan.model.dtype_name,
        versions=library_versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - started, 3),
    )
    if team.leads:
        warn_if_short(lengths, f"{plan.model.spec} is scored")
        if sketch is not None:
            check_space(output, sketch.nbytes, _NO_SKETCH)
        write_ranking(output, ranking, sketch)
    ranking = team.broadcast(ranking)
    run.partial.discard()  # only now: whoever failed before this finds the finished items again
    return ranking


def _weighting(plan: Plan, sites: Sequence[RankedSite]) -> list[str | float]:
    """The weights of the scores' parts where neither settings nor a budget say any."""
    return list(auto_weighting({site.kind for site in sites}, plan.model.task.name))


def _losses(sites: Iterable[RankedSite], kind: str) -> list[SiteLosses]:
    """The losses of lower ranks, which are those of each dimension and all behind it, or of whole sublayers."""
    return [
        SiteLosses(site.name.removesuffix(f".{kind}"), site.columns, site.trajectory, site.output)
        for site in sites
        if site.kind == kind
    ]


def _check_finite(sites: list[RankedSite], plan: Plan) -> None:
    """Raise `InputError` for scores that no later stage could use, before a file has them."""
    for site in sites:
        if not site.is_finite():
            weights = plan.model.module.parameters()
            broken = not all(torch.isfinite(p).all() for p in weights if p.device.type != "meta")
            raise InputError(
                f"the scores of {site.name} are not finite, so that no ranking is written",
                f"{plan.model.spec} has weights that are NaN or infinite: take another copy of it"
                if broken
                else f"its weights are very large, or {param('output_weight')} is: check both",
            )


def _model_facts(model: OpenModel) -> ModelFacts:
    facts: ModelFacts = {
        "id": model.spec,
        "digest": model.digest,
        "family": model.family.name,
        "task": model.task.name,
        "class": type(model.module).__name__,
    }
    if model.merges:
        facts["merges"] = model.merges
    if chained := [site.name for site in model.anatomy if site.chained]:
        facts["chained"] = chained
    if model.anatomy.coupled:
        facts["shared"] = [asdict(layer) for layer in model.anatomy.coupled]
    facts["config"] = sized_by_config(model.module, model.anatomy)
    if model.anatomy.token_sites:
        facts["prefix"] = model.anatomy.prefix
    return facts


class _Run:
    """All items of a plan, done by a team, resumable."""

    def __init__(
        self,
        plan: Plan,
        identity: dict[str, Any],
        output: Path,
        team: Team,
        on_progress: Progress,
        partial: Partial | None,
    ) -> None:
        self.batches = len(plan.calibration)
        self.team = team
        self.on_progress = on_progress
        self.worker = Worker(plan)
        if partial is not None:  # the leader's, which has cleared what another plan left
            self.partial = partial
            # once in the parts, once in the ranking: better refused now than after hours of work
            needed = 2 * _sketch_bytes(self.worker.method) - self.partial.nbytes()
            check_space(output, needed, _NO_SKETCH)
        team.barrier()
        if partial is None:
            self.partial = Partial(output, identity, announce=False)
        self.done = self.total = 0.0

    def finish(self) -> Worker:
        """Do all work; the leader's worker has what everyone found."""
        items = self.worker.items()
        self._do(items)
        while items := self.team.broadcast(self.worker.more_items() if self.team.leads else None):
            self._do(items)
        return self.worker

    def _do(self, items: list[Item]) -> None:
        """Do the items; the leader's totals have all of them, in their order, whoever did them and when."""
        if not items:
            return
        self.total += sum(item.work for item in items)
        found: dict[str, Arrays] = {}
        if self.team.leads:
            for item in items:
                if (stored := self.partial.get(item.key)) is not None:
                    found[item.key] = stored
                    self._advance(item.work, "parts of an earlier run")
        # what is left is shared, not all: one process may have done the whole first half
        left = self.team.broadcast([item for item in items if item.key not in found])
        for item in self.team.share(left):
            self.team.check_others()
            found[item.key] = self._one(item)
        if self.team.leads and self.team.size > 1:
            self.on_progress(self.done, self.total, "waiting for the other processes")
        everything = {key: arrays for part in self.team.gather(found) for key, arrays in part.items()}
        if self.team.leads:
            for item in items:
                self.worker.add(item, everything[item.key])
            self._advance(self.total - self.done, "done")

    def _one(self, item: Item) -> Arrays:
        label = f"batch {item.batch + 1}/{self.batches}, {item.site or item.engine}"
        reported = 0.0

        def report(work: float) -> None:
            nonlocal reported
            reported += work
            self._advance(work * self.team.size, label)  # the others do as much in the meantime

        found = self.worker.run(item, report)
        self.partial.put(item.key, found)
        self._advance((item.work - reported) * self.team.size, label)
        return found

    def _advance(self, work: float, label: str) -> None:
        self.done = min(self.done + work, self.total)
        if self.team.leads:
            self.on_progress(self.done, self.total, label)


def _sketch_bytes(method: ScoringMethod) -> int:
    """Size of the sketch to be kept."""
    rows = method.sketched_probes() * method.calibration.batches.count
    units = sum(site.units for site in method.anatomy if site.kind not in BESIDE)
    return rows * units * len(method.sketches) * np.float32().nbytes


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
