"""`prune`: score, select and apply in one, with the ranking cached by what went into it."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

from optin_cli.artefacts.mask import Mask
from optin_cli.artefacts.ranking import Ranking, read_ranking, read_sketch
from optin_cli.errors import ArtefactError, UsageError
from optin_cli.importance import AUTO
from optin_cli.measure.latency import device_name
from optin_cli.models.checkpoint import OpenModel
from optin_cli.scoring import score as scoring
from optin_cli.scoring.plan import Plan, Progress
from optin_cli.selection.request import Request, check_table
from optin_cli.selection.select import select
from optin_cli.surgery import apply as surgery
from optin_cli.surgery.plan import make_plan
from optin_cli.surgery.settings import Compensation

NO_COMPENSATION = Compensation(method="none")


@dataclass(frozen=True)
class Pruned:
    """The three results of one call."""

    ranking: Ranking
    ranking_path: Path
    ranking_reused: bool
    mask: Mask
    applied: surgery.Applied


def ranking_path(plan: Plan, folder: Path) -> Path:
    """`<folder>/<model>-<data>-<digest of the inputs>.h5`: other inputs never meet the same name."""
    from optin_cli.artefacts.files import digest_json

    names = [_slug(plan.model.spec), _slug(plan.examples.data.spec), digest_json(plan.identity())[:8]]
    return folder / f"{'-'.join(names)}.h5"


def prune(
    plan: Plan,
    request: Request,
    output: Path,
    ranking: Path,
    *,
    compensation: Compensation = NO_COMPENSATION,
    at_most: bool = False,
    teacher: OpenModel | None = None,
    force: bool = False,
    final: Path | None = None,
    on_progress: Progress = lambda *_: None,
) -> Pruned:
    """Write the pruned model to `output`, scoring only if `ranking` is not the plan's ranking already.

    `compensation` reads more rows of the plan's data (`at_most`: as many as there are, without a note) and follows
    `teacher`, by default the plan's model, which is consumed in memory. The plan's lambda replaces the request's.
    `final` is where the last of several steps goes, by default `output`: what is in its way ends the first one. Raises
    what the three stages raise, before anything is scored where that can be known.
    """
    request.check()
    if request.table is not None:
        units = {site.name: site.units for site in plan.model.anatomy}
        device, dtype = device_name(plan.model.device), str(plan.model.dtype).removeprefix("torch.")
        check_table(request.table, device, dtype, units, force=request.force)
    _check_serves(plan, request)
    surgery.check_output(final or output, plan.model)
    if ranking.exists():
        _check_belongs(ranking, plan)
    found = scoring.existing(ranking, plan, any_lambda=plan.method.recombines)
    if found is None and not force:
        surgery.check_unmade(final or output)
    scored = found or scoring.score(plan, ranking, on_progress)
    sketch = read_sketch(ranking) if request.interactions != "none" else None
    mask = select(scored, _weighted(plan, request), sketch)
    again = make_plan(plan.model, mask, compensation, plan.examples.data, at_most=at_most)
    applied = None if force else surgery.existing(output, plan.model, mask, again)
    applied = applied or surgery.apply(
        plan.model, mask, output, plan=again, on_progress=on_progress, teacher=teacher
    )
    return Pruned(scored, ranking, found is not None, mask, applied)


def _weighted(plan: Plan, request: Request) -> Request:
    """The request with the plan's lambda, whatever lambda a ranking that is reused was made with."""
    if not plan.method.recombines:
        return dataclasses.replace(request, output_weight=None)
    weight, features = plan.settings.output_weight, request.feature_weights
    if weight is None and features is None:
        features = AUTO
    return dataclasses.replace(request, output_weight=weight, feature_weights=features)


def _check_serves(plan: Plan, request: Request) -> None:
    """Raise `UsageError` for what the plan's ranking will not hold."""
    method = plan.settings.method
    if request.feature_weights is not None and not plan.method.recombines:
        raise UsageError(f"a {method} ranking has no parts to recombine", "leave --feature-weights out")
    if request.merge != "none" and not plan.settings.tokens:
        raise UsageError(
            f"--tokens {request.merge} needs to know what merging tokens costs", "score with tokens=True"
        )
    if request.interactions != "none" and not plan.method.sketches:
        raise UsageError(
            f"--interactions needs a sketch, and --method {method} makes none", "use --method curvature"
        )


def _check_belongs(path: Path, plan: Plan) -> None:
    """Raise `ArtefactError` for a ranking of another model: here it is an input, not an output in the way."""
    ranking = read_ranking(path)
    if ranking.model["digest"] != plan.model.digest:
        raise ArtefactError(
            f"{path} ranks other weights ({ranking.model['id']}, {ranking.model['digest'][:12]}) than "
            f"{plan.model.spec} ({plan.model.digest[:12]})",
            "leave --ranking out, or name a file to be written",
        )


def _slug(spec: str) -> str:
    name = (
        spec.rstrip("/").rpartition("/")[2] if not spec.startswith(("demo:", "timm:", "builtin:")) else spec
    )
    return re.sub(r"[^A-Za-z0-9_.]+", "-", name.partition("?")[0]).strip("-.") or "model"
