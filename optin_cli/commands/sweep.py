"""`optin sweep`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import typer

from optin_cli import console
from optin_cli.commands import options
from optin_cli.commands.budgets import BudgetGroup
from optin_cli.commands.groups import Group, everyday
from optin_cli.commands.present import point_facts, point_line, show_points
from optin_cli.commands.trials import MeasuringOptions, open_all
from optin_cli.scoring.settings import ScoreSettings
from optin_cli.selection.settings import Request, scored_for

_SCORING = "method samples probes output_weight batch_size max_length seed"


@dataclass(frozen=True)
class Points:
    """The points of a sweep beside its budgets, and the ranking that they come from."""

    seeds: int = field(
        default=1,
        metadata={
            "panel": "Budget",
            "least": 1,
            "help": "Seeds: each scores, refits and measures on other draws.",
        },
    )
    variant: tuple[str, ...] = field(
        default=(),
        metadata={
            "panel": "Budget",
            "metavar": "NAME",
            "help": "Further points to compare with: random (units drawn by chance), uncompensated or uniform; may be "
            "repeated.",
        },
    )
    ranking: Path | None = field(
        default=None,
        metadata={"panel": "Output", "help": "Ranking to reuse or write (default: in the sweep's folder)."},
    )


@everyday("data", "output", "flops", "eval_data", "samples", "device")
def sweep(
    model: options.Model,
    data: options.CalibrationData,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the sweep.")],
    requests: Annotated[dict[str, Request], BudgetGroup(without="output_weight")],
    points: Annotated[Points, Group(Points)],
    measuring: MeasuringOptions,
    settings: Annotated[ScoreSettings, Group(ScoreSettings, _SCORING, panel="Calibration")],
    refit: Annotated[options.Refit, options.compensation("compensate_", shared="batch_size max_length seed")],
    opening: options.TypedOpening,
    writing: options.Updated,
) -> None:
    """Prune to many budgets with one ranking, evaluate and time each model, and keep all of them as one folder.

    It ends in a table and a page, `report.html`. What is there is kept: a sweep that was stopped goes on, and more
    budgets are added to those before.

    Examples:

      optin sweep demo:minilm --data builtin:prose --flops 0.9,0.7,0.5 -o sweep/

      optin sweep ./my-bert --data glue/sst2 --flops 0.5 --seeds 3 -o sweep/
    """
    from optin_cli.reporting.write import write
    from optin_cli.scoring.distributed import refuse_team
    from optin_cli.trials.sweep import Series, check_requests
    from optin_cli.trials.sweep import sweep as stage

    refuse_team("sweep")
    asked = list(requests.values())
    check_requests(asked)
    settings = replace(settings, **scored_for(asked))
    series = Series(settings, refit.settings, refit.at_most, points.seeds, points.variant, points.ranking)
    series.check()
    opened = open_all(
        model, data, settings, measuring, opening, output, force=writing.force, update=writing.update
    )
    with console.progress(not writing.quiet) as on_progress:
        done = stage(
            opened.trials,
            series.recipes(output, opened.plan, opened.planner),
            asked,
            on_progress,
            (lambda point: None) if writing.quiet else lambda point: console.note(point_line(point)),
        )
    page = output / "report.html"
    ranking = [points.ranking] if points.ranking else []
    write([output, *ranking], page)
    if not writing.quiet:
        show_points(done.points)
        console.note(f"wrote {page}")
    if writing.json:
        console.emit_json(
            {
                "sweep": str(output),
                "report": str(page),
                "points": [point_facts(done, point) for point in done.points],
            }
        )
    else:
        console.data(str(output))
