"""`optin prune`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from optin_cli import console
from optin_cli.artefacts.files import check_writable, renew
from optin_cli.commands import options
from optin_cli.commands.budgets import BudgetGroup
from optin_cli.commands.groups import Group, everyday
from optin_cli.commands.present import applied_facts, mask_facts, show_applied, show_mask, show_reading
from optin_cli.scoring.settings import ScoreSettings
from optin_cli.selection.settings import Request

_SCORING = "method samples probes output_weight batch_size max_length seed"


@everyday("data", "output", "flops", "samples", "batch_size", "device")
def prune(
    model: options.Model,
    data: options.CalibrationData,
    output: Annotated[Path, typer.Option("--output", "-o", help="Model directory to write.")],
    request: Annotated[Request, BudgetGroup(without="output_weight", single=True)],
    settings: Annotated[ScoreSettings, Group(ScoreSettings, _SCORING, panel="Calibration")],
    refit: Annotated[
        options.Refit,
        options.compensation("compensate_", shared="batch_size max_length seed"),
    ],
    opening: options.PlainOpening,
    writing: options.Output,
    ranking: Annotated[
        Path | None,
        typer.Option(
            "--ranking",
            rich_help_panel="Output",
            help="Ranking to reuse or write (default: rankings/<model>-<data>-<digest>.h5).",
        ),
    ] = None,
    steps: Annotated[
        int,
        typer.Option(
            "--steps",
            rich_help_panel="Budget",
            help="Reach the budget in so many steps, scoring again at each.",
        ),
    ] = 1,
) -> None:
    """Score, select, apply and compensate in one. The ranking is kept: the next budget takes seconds.

    Examples:

      optin prune demo:minilm --data builtin:docs --flops 0.6 -o m-60/

      optin prune ./my-bert --data glue/sst2 --flops 0.5 --min-heads 1 -o small/

      optin prune ./my-bert --data glue/sst2 --flops 0.3 --steps 4 -o tiny/
    """
    from optin_cli import pipeline
    from optin_cli.scoring.distributed import refuse_team
    from optin_cli.scoring.methods.registry import configured
    from optin_cli.scoring.plan import make_plan

    refuse_team("prune")
    check_writable(output, "folder")
    if ranking is not None:
        check_writable(ranking, "ranking")
    pipeline.check_steps(steps, request)
    settings = replace(settings, tokens=request.merge != "none")
    settings = configured(settings)  # what it raises comes before the model is opened
    plan = make_plan(opening.open(model, "float32"), data, settings)
    if not writing.quiet:
        show_reading(plan.examples)
    path = ranking or pipeline.ranking_path(plan, Path("rankings"))
    with console.progress(not writing.quiet) as on_progress:
        *_, pruned = pipeline.prune_in_steps(
            plan, request, output, path, steps, rankings=path.parent, compensation=refit.settings,
            at_most=refit.at_most, force=writing.force, update=writing.update, on_progress=on_progress,
        )  # fmt: skip
    if pruned.ranking_reused:
        renew(path)
    if pruned.applied.reused:
        renew(output)
    if not writing.quiet:
        console.note(f"{'reused' if pruned.ranking_reused else 'wrote'} the ranking {path}")
        show_mask(pruned.mask)
        show_applied(pruned.applied)
    if writing.json:
        console.emit_json(
            {
                "model": str(output),
                "ranking": str(path),
                "ranking_reused": pruned.ranking_reused,
                "mask": mask_facts(pruned.mask),
                **applied_facts(pruned.applied),
            }
        )
    else:
        console.data(str(output))
