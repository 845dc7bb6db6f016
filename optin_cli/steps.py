"""`prune --steps`: walk the budget down, scoring what is left anew each time.

One ranking of the dense model knows less and less about what is left of it. So each step prunes and compensates,
and the next one ranks the result. Compensation always follows the original model. TextPruner and K-prune
prune in rounds, too (METHOD section 9).
"""

from __future__ import annotations

import shutil
from pathlib import Path

from optin_cli.errors import UsageError
from optin_cli.models.checkpoint import OpenModel, open_model
from optin_cli.prune import NO_COMPENSATION, Pruned, prune, ranking_path
from optin_cli.scoring.plan import Plan, Progress, make_plan
from optin_cli.selection.request import Request
from optin_cli.surgery.settings import Compensation


def check_steps(steps: int, request: Request) -> None:
    """Raise `UsageError` for steps that can't be taken."""
    if steps < 1:
        raise UsageError(f"--steps {steps}: at least 1 is needed")
    if steps > 1 and request.relative_to != "dense":
        raise UsageError("--steps counts budgets from the dense model", "leave --relative-to out, or --steps")
    if steps > 1 and not any(budget.is_share for budget in request.asked):
        raise UsageError("--steps needs a budget that is a share", "give --flops, --params or --latency 0.6")


def prune_in_steps(
    plan: Plan,
    request: Request,
    output: Path,
    ranking: Path,
    steps: int,
    *,
    rankings: Path,
    compensation: Compensation = NO_COMPENSATION,
    at_most: bool = False,
    force: bool = False,
    on_progress: Progress = lambda *_: None,
) -> list[Pruned]:
    """Prune the plan's model to `request` in `steps` geometric steps; returns every step, the last at `output`.

    `ranking` is the first step's, of the dense model; the later ones go into the folder `rankings`. Budgets count
    from the dense model at every step; those in MiB and ms hold at the last one. Raises what `prune` raises.
    """
    check_steps(steps, request)
    done: list[Pruned] = []
    folder = output.with_name(f".{output.name}.steps")
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    current = plan
    try:
        for step in range(1, steps + 1):
            last = step == steps
            target = output if last else folder / str(step)

            def tell(part: float, whole: float, what: str, step: int = step) -> None:
                share = part / whole if whole else 1.0
                on_progress(step - 1 + share, steps, f"step {step}/{steps}, {what}")

            done.append(
                prune(
                    current,
                    request if last else _eased(request, step / steps),
                    target,
                    ranking if step == 1 else ranking_path(current, rankings),
                    compensation=compensation,
                    at_most=at_most,
                    teacher=None if step == 1 else _opened(plan, plan.model.spec),
                    force=force,
                    final=output,
                    on_progress=tell if steps > 1 else on_progress,
                )
            )
            if not last:
                smaller = _opened(plan, str(target))
                current = make_plan(smaller, plan.examples.data, plan.settings, plan.calibration.memory)
    finally:
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
    return open_model(spec, task=task, device=str(plan.model.device), dtype="float32", family=family)
