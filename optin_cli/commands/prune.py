"""`optin prune`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optin_cli import console
from optin_cli.artefacts.files import check_writable, renew
from optin_cli.artefacts.mask import Mask, read_mask
from optin_cli.artefacts.point import Sweep
from optin_cli.commands import options
from optin_cli.commands.budgets import BudgetGroup
from optin_cli.commands.groups import Group, everyday
from optin_cli.commands.present import (
    applied_facts,
    mask_facts,
    point_facts,
    point_line,
    show_applied,
    show_mask,
    show_reading,
)
from optin_cli.commands.trials import MeasuringOptions, open_all
from optin_cli.scoring.settings import ScoreSettings
from optin_cli.selection.settings import Request, scored_for
from optin_cli.trials.pick import Promise, promised

if TYPE_CHECKING:
    from optin_cli.artefacts.point import Point
    from optin_cli.data.sources import DataSpec
    from optin_cli.pruning.apply import Applied
    from optin_cli.trials.settings import Measuring

_SCORING = "method samples probes output_weight batch_size max_length seed"


@dataclass(frozen=True)
class Goal:
    """What the model must keep in place of a budget, and the way there."""

    max_drop: float | None = field(
        default=None,
        metadata={
            "metavar": "POINTS",
            "help": "Without a budget: find the smallest model that loses at most so many points on --eval-data.",
        },
    )
    min_speedup: float | None = field(
        default=None,
        metadata={
            "metavar": "TIMES",
            "help": "Without a budget: find the largest model that is measured to be so much faster.",
        },
    )
    sweep: Path | None = field(
        default=None,
        metadata={
            "panel": "Output",
            "metavar": "DIR",
            "help": "Sweep that --max-drop and --min-speedup keep their trials in (default: OUTPUT.sweep).",
        },
    )
    ranking: Path | None = field(
        default=None,
        metadata={
            "panel": "Output",
            "help": "Ranking to reuse or write (default: rankings/<model>-<data>-<digest>.h5).",
        },
    )
    steps: int = field(
        default=1, metadata={"least": 1, "help": "Reach the budget in so many steps, scoring again at each."}
    )

    @property
    def promise(self) -> Promise:
        return Promise(max_drop=self.max_drop, min_speedup=self.min_speedup)

    def check(self, request: Request) -> bool:
        """Whether a model is to be searched for: see `promised`."""
        return promised(self.promise, request, self.steps)


@everyday("data", "output", "flops", "max_drop", "samples", "device")
def prune(
    model: options.Model,
    data: options.CalibrationData,
    output: Annotated[Path, typer.Option("--output", "-o", help="Model directory to write.")],
    request: Annotated[Request, BudgetGroup(without="output_weight", single=True, optional=True)],
    goal: Annotated[Goal, Group(Goal, panel="Budget")],
    measuring: MeasuringOptions,
    settings: Annotated[ScoreSettings, Group(ScoreSettings, _SCORING, panel="Calibration")],
    refit: Annotated[
        options.Refit,
        options.compensation("compensate_", shared="batch_size max_length seed"),
    ],
    opening: options.PlainOpening,
    writing: options.Updated,
) -> None:
    """Score, select, apply and compensate in one. The ranking is kept: the next budget takes seconds.

    With --max-drop or --min-speedup in place of a budget, the budget is found by bisection, with one ranking. Every
    trial is kept as a point of a sweep.

    Examples:

      optin prune demo:minilm --data builtin:prose --flops 0.6 -o m-60/

      optin prune ./my-bert --data glue/sst2 --flops 0.5 --min-heads 1 -o small/

      optin prune ./my-bert --data glue/sst2 --flops 0.3 --steps 4 -o tiny/

      optin prune ./my-bert --data glue/sst2 --max-drop 1.0 -o small/
    """
    from optin_cli import pipeline
    from optin_cli.scoring.distributed import refuse_team
    from optin_cli.scoring.methods.registry import configured
    from optin_cli.scoring.plan import make_plan

    refuse_team("prune")
    check_writable(output, "folder")
    if goal.ranking is not None:
        check_writable(goal.ranking, "ranking")
    settings = replace(settings, **scored_for([request]))
    if goal.check(request):
        _search(model, data, output, request, goal, measuring, settings, refit, opening, writing)
        return
    pipeline.check_steps(goal.steps, request)
    settings = configured(settings)  # what it raises comes before the model is opened
    plan = make_plan(opening.open(model, "float32"), data, settings)
    if not writing.quiet:
        show_reading(plan.examples)
    path = goal.ranking or pipeline.ranking_path(plan, Path("rankings"))
    with console.progress(not writing.quiet) as on_progress:
        *_, pruned = pipeline.prune_in_steps(
            plan, request, output, path, goal.steps, rankings=path.parent, compensation=refit.settings,
            at_most=refit.at_most, force=writing.force, update=writing.update, on_progress=on_progress,
        )  # fmt: skip
    if pruned.ranking_reused:
        renew(path)
    if pruned.applied.reused:
        renew(output)
    _present(output, path, pruned.ranking_reused, pruned.mask, pruned.applied, writing)


def _search(
    model: str,
    data: DataSpec,
    output: Path,
    request: Request,
    goal: Goal,
    measuring: Measuring,
    settings: ScoreSettings,
    refit: options.Refit,
    opening: options.Opening,
    writing: options.Writing,
) -> None:
    """Find the model that keeps the promise, and copy it to `output`."""
    from optin_cli.pipeline import ranking_path
    from optin_cli.pruning.apply import check_output, recorded_report
    from optin_cli.trials.run import Recipe
    from optin_cli.trials.search import copy_model, search_budget

    folder = goal.sweep or output.with_name(f"{output.name}.sweep")
    opened = open_all(
        model, data, settings, measuring, opening, folder, force=writing.force, update=writing.update
    )
    check_output(output, opened.plan.model)
    path = goal.ranking or ranking_path(opened.plan, Path("rankings"))
    reused = path.exists() and not writing.force
    recipe = Recipe(opened.plan, refit.settings, path, refit.at_most)

    def tell(point: Point) -> None:
        if not writing.quiet:
            console.note(point_line(point))

    with console.progress(not writing.quiet) as on_progress:
        found = search_budget(opened.trials, recipe, request, goal.promise, on_progress, tell)
    sweep = Sweep(folder, found.trials)
    best = sweep.directory(found.best)
    copied = copy_model(best, output, force=writing.force, update=writing.update)
    if not copied:
        renew(output)
    applied = replace(recorded_report(output, int(opened.plan.model.dense["params"])), reused=not copied)
    mask = read_mask(folder / f"{found.best.name}.mask.json")
    trials = [point_facts(sweep, point) for point in found.trials]
    more = {"sweep": str(folder), "best": found.best.name, "trials": trials}
    _present(output, path, reused, mask, applied, writing, more)


def _present(
    output: Path,
    ranking: Path,
    reused: bool,
    mask: Mask,
    applied: Applied,
    writing: options.Writing,
    more: dict[str, Any] | None = None,
) -> None:
    if not writing.quiet:
        console.note(f"{'reused' if reused else 'wrote'} the ranking {ranking}")
        show_mask(mask)
        show_applied(applied)
    if writing.json:
        console.emit_json(
            {
                "model": str(output),
                "ranking": str(ranking),
                "ranking_reused": reused,
                "mask": mask_facts(mask),
                **applied_facts(applied),
                **(more or {}),
            }
        )
    else:
        console.data(str(output))
