"""`prune`: score, select and apply in one, with the ranking cached by what went into it; in one step or several.

One ranking of the dense model knows less and less about what is left of it. So `prune_in_steps` walks the budget down:
each step prunes and compensates, and the next one ranks the result. Compensation always follows the original model.
TextPruner and K-prune prune in rounds, too.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from optin_cli.architectures.config_sizes import sized_by_config
from optin_cli.artefacts.changes import is_asked
from optin_cli.artefacts.files import check_no_folder, digest_json
from optin_cli.artefacts.mask import Mask
from optin_cli.artefacts.ranking import Ranking, read_ranking, read_sketch
from optin_cli.artefacts.temporary import scratch
from optin_cli.compensation.plan import make_plan
from optin_cli.compensation.settings import Compensation
from optin_cli.errors import ArtefactError, OutputDiffers, UsageError, param
from optin_cli.importance import AUTO
from optin_cli.loading.checkpoint import OpenModel, open_model
from optin_cli.loading.from_module import copy_of
from optin_cli.measure.latency import device_name
from optin_cli.pruning import apply as pruning
from optin_cli.scoring import score as scoring
from optin_cli.scoring.plan import Plan, Progress
from optin_cli.scoring.plan import make_plan as make_scoring_plan
from optin_cli.scoring.settings import DEFAULT_METHOD
from optin_cli.selection.select import select
from optin_cli.selection.settings import Request, check_table
from optin_cli.selection.uniform import check_sized

NO_COMPENSATION = Compensation(method="none")


@dataclass(frozen=True)
class Pruned:
    """The three results of one call."""

    ranking: Ranking
    ranking_path: Path | None
    ranking_reused: bool
    mask: Mask
    applied: pruning.Applied
    model: pruning.PrunedModel | None = None
    """The pruned model; None where it was there already."""


def ranking_path(plan: Plan, folder: Path) -> Path:
    """`<folder>/<model>-<data>-<digest of the inputs>.h5`: other inputs never meet the same name."""
    names = [_slug(plan.model.spec), _slug(plan.examples.data.spec), digest_json(plan.identity())[:8]]
    return folder / f"{'-'.join(names)}.h5"


def _explain_beside(path: Path, plan: Plan) -> None:
    """Say what differs in the newest ranking beside `path`: that of other inputs has another name."""
    if not is_asked() or path != ranking_path(plan, path.parent):
        return
    named = path.stem.rpartition("-")[0]
    beside = [one for one in path.parent.glob("*.h5") if one.stem.rpartition("-")[0] == named and one != path]
    if beside:
        newest = max(beside, key=lambda one: one.stat().st_mtime)
        scoring.matching(plan, [("", newest)])


def score(
    plan: Plan, output: Path | None = None, on_progress: Progress = lambda *_: None, *, force: bool = False
) -> Ranking:
    """The plan's ranking, with its sketch: from `output` where that is it already, else scored, and written there.

    Without an `output` it is in memory alone. Raises what `scoring.existing` and `scoring.score` raise.
    """
    if output is not None:
        check_no_folder(output, "ranking")
        found = None if force else scoring.existing(output, plan)
        return _with_sketch(found or scoring.score(plan, output, on_progress), output)
    with scratch() as folder:
        path = folder / "ranking.h5"
        return _with_sketch(scoring.score(plan, path, on_progress), path)


def _with_sketch(ranking: Ranking, path: Path) -> Ranking:
    return dataclasses.replace(ranking, sketch=read_sketch(path))


def prune(
    plan: Plan,
    request: Request,
    output: Path | None,
    ranking: Path | None,
    *,
    compensation: Compensation = NO_COMPENSATION,
    at_most: bool = False,
    teacher: OpenModel | None = None,
    force: bool = False,
    update: bool = False,
    final: Path | None = None,
    copied: bool = False,
    on_progress: Progress = lambda *_: None,
) -> Pruned:
    """Write the pruned model to `output`, scoring only if `ranking` is not the plan's ranking already.

    Without `output` or `ranking`, the one or the other is in memory alone. `compensation` reads more rows of the
    plan's data (`at_most`: as many as there are, without a note) and follows `teacher`, by default the plan's model,
    which is consumed in memory unless it is to be `copied`. The plan's lambda replaces the request's. `final` is where
    the last of several steps goes, by default `output`: what is in its way ends the first one, unless `update` replaces
    what was made from other inputs. Raises what the three stages raise, before anything is scored where that can be
    known.
    """
    request.check()
    if request.table is not None:
        units = {site.name: site.units for site in plan.model.anatomy}
        device, dtype = device_name(plan.model.device), plan.model.dtype_name
        check_table(request.table, device, dtype, units, force=request.force)
    _check_serves(plan, request)
    last = final or output
    if last is not None:
        pruning.check_output(last, plan.model)
    found = None
    if ranking is not None:
        if ranking.exists() and not update:
            _check_belongs(ranking, plan)
        with suppress(OutputDiffers) if update else nullcontext():
            found = scoring.existing(ranking, plan, any_lambda=plan.method.recombines)
    if found is None and ranking is not None:
        _explain_beside(ranking, plan)
    if found is None and last is not None and not (force or update):
        pruning.check_unmade(last)
    others = False
    if ranking is None:
        scored = score(plan, on_progress=on_progress)
    else:
        scored, others = (found, True) if found else scoring.score_once(plan, ranking, on_progress)
        if request.interactions != "none":
            scored = _with_sketch(scored, ranking)
    mask = select(scored, _weighted(plan, request), scored.sketch)
    again = make_plan(plan.model, mask, compensation, plan.examples.data, at_most=at_most)
    reused = None
    if output is not None and not force:
        with suppress(OutputDiffers) if update else nullcontext():
            reused = pruning.existing(output, plan.model, mask, again)
    if reused is not None:
        return Pruned(scored, ranking, others, mask, reused)
    model = pruning.prune_model(
        copy_of(plan.model) if copied else plan.model,
        mask,
        output,
        plan.calibration.batches,
        again,
        on_progress,
        teacher,
    )
    return Pruned(scored, ranking, others, mask, model.report, model)


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
        raise UsageError(
            f"a {method} ranking has no parts to recombine", f"leave {param('feature_weights')} out"
        )
    if request.merge != "none" and not plan.settings.tokens:
        raise UsageError(
            f"{param('tokens', request.merge)} needs to know what merging tokens costs",
            "score with tokens=True",
        )
    if request.ranks and not plan.settings.ranks:
        raise UsageError(
            f"{param('ranks', True)} needs to know what lower ranks of heads cost", "score with ranks=True"
        )
    if request.uniform:
        module = plan.model.module
        sized = sized_by_config(module, plan.model.anatomy)
        check_sized(sized, type(module).__name__, ranks=bool(request.ranks))
    if request.interactions != "none" and not plan.method.sketches:
        raise UsageError(
            f"{param('interactions')} needs a sketch, and {param('method', method)} makes none",
            f"use {param('method', DEFAULT_METHOD)}",
        )


def _check_belongs(path: Path, plan: Plan) -> None:
    """Raise `ArtefactError` for a ranking of another model: here it is an input, not an output in the way."""
    ranking = read_ranking(path)
    if ranking.model["digest"] != plan.model.digest:
        raise ArtefactError(
            f"{path} ranks other weights ({ranking.model['id']}, {ranking.model['digest'][:12]}) than "
            f"{plan.model.spec} ({plan.model.digest[:12]})",
            f"leave {param('ranking')} out, or name a file to be written",
        )


def _slug(spec: str) -> str:
    name = (
        spec.rstrip("/").rpartition("/")[2]
        if not spec.startswith(("demo:", "timm:", "torchvision:", "builtin:", "memory:"))
        else spec
    )
    return re.sub(r"[^A-Za-z0-9_.]+", "-", name.partition("?")[0]).strip("-.") or "model"


def check_steps(steps: int, request: Request) -> None:
    """Raise `UsageError` for steps that can't be taken."""
    if steps < 1:
        raise UsageError(f"{param('steps', steps)}: at least 1 is needed")
    if steps > 1 and request.relative_to != "dense":
        raise UsageError(
            f"{param('steps')} counts budgets from the dense model",
            f"leave {param('relative_to')} out, or {param('steps')}",
        )
    if steps > 1 and not any(budget.is_share for budget in request.asked):
        raise UsageError(
            f"{param('steps')} needs a budget that is a share",
            f"give {param('flops')}, {param('params')} or {param('latency', 0.6)}",
        )


def prune_in_steps(
    plan: Plan,
    request: Request,
    output: Path | None,
    ranking: Path | None,
    steps: int,
    *,
    rankings: Path | None = None,
    compensation: Compensation = NO_COMPENSATION,
    at_most: bool = False,
    force: bool = False,
    update: bool = False,
    copied: bool = False,
    on_progress: Progress = lambda *_: None,
) -> list[Pruned]:
    """Prune the plan's model to `request` in `steps` geometric steps; returns every step, the last at `output`.

    `ranking` is the first step's, of the dense model; the later ones go into the folder `rankings`, or are in memory
    alone. So are the models of the steps on the way if the plan's is to be `copied`. Budgets count from the dense
    model at every step; those in MiB and ms hold at the last one. Raises what `prune` raises.
    """
    check_steps(steps, request)
    done: list[Pruned] = []
    folder = output.with_name(f".{output.name}.steps") if output is not None and not copied else None
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    current = plan
    try:
        for step in range(1, steps + 1):
            last = step == steps
            target = output if last else folder and folder / str(step)

            def report(part: float, whole: float, what: str, step: int = step) -> None:
                share = part / whole if whole else 1.0
                on_progress(step - 1 + share, steps, f"step {step}/{steps}, {what}")

            if step == 1:
                path, teacher = ranking, None
            else:
                path = None if rankings is None else ranking_path(current, rankings)
                teacher = plan.model if copied else _opened(plan, plan.model.spec)
            done.append(
                prune(
                    current,
                    request if last else _eased(request, step / steps),
                    target,
                    path,
                    compensation=compensation,
                    at_most=at_most,
                    teacher=teacher,
                    force=force,
                    update=update,
                    final=output,
                    copied=copied and step == 1,
                    on_progress=report if steps > 1 else on_progress,
                )
            )
            if not last:
                smaller = done[-1].model if folder is None else _opened(plan, str(target))
                assert smaller is not None  # what is in memory alone is never there already
                data, settings = plan.examples.data, plan.settings
                current = make_scoring_plan(smaller, data, settings, plan.calibration.memory)
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    return done


def _eased(request: Request, progress: float) -> Request:
    """The budgets of a step on the way: shares fall geometrically, amounts wait for the last step."""
    eased = (budget.eased(progress) for budget in request.asked)
    return request.with_budgets(budget for budget in eased if budget)


def _opened(plan: Plan, spec: str) -> OpenModel:
    """Another model, opened as the plan's was."""
    task = plan.model.task.name if plan.model.source.library == "transformers" else None
    family = None if spec != plan.model.spec else plan.model.family
    trusted = plan.model.source.trust_remote_code
    return open_model(
        spec,
        task=task,
        device=str(plan.model.device),
        dtype="float32",
        family=family,
        trust_remote_code=trusted,
    )
