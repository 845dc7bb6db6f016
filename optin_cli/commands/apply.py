"""`optin apply`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from optin_cli import console
from optin_cli.artefacts.files import check_writable
from optin_cli.artefacts.mask import read_mask
from optin_cli.commands import options
from optin_cli.commands.groups import everyday
from optin_cli.commands.present import applied_facts, show_applied


@everyday("output", "compensate", "data", "samples", "batch_size", "device")
def apply(
    model: options.Model,
    mask_file: Annotated[Path, typer.Argument(metavar="MASK", help="Written by `optin select`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Model directory to write.")],
    refit: Annotated[options.Refit, options.compensation()],
    data: options.OptionalData,
    workers: options.Workers,
    opening: options.PlainOpening,
    writing: options.Updated,
) -> None:
    """Slice the weights, refit what is left, and write a smaller model directory that loads again.

    Compensation is least squares toward the dense model on unlabelled rows, block by block; `auto` keeps at each
    site what has the smallest error on held-out rows. The written model is loaded back and compared with the
    masked one on calibration rows first.

    Examples:

      optin apply demo:minilm m-60.mask.json -o m-60/

      optin apply demo:minilm m-60.mask.json -o m-60-plain/ --compensate none

      python -c "import optin_cli; model = optin_cli.load('m-60/')"
    """
    from optin_cli.compensation.plan import make_plan
    from optin_cli.pruning import apply as stage
    from optin_cli.pruning.check import open_check

    check_writable(output, "folder")
    chosen = read_mask(mask_file)
    opened = opening.open(model, "float32")
    stage.check_fit(opened, chosen)
    stage.check_output(output, opened)
    plan = make_plan(opened, chosen, refit.settings, data, at_most=refit.at_most, workers=workers)
    batches = open_check(opened, data) if data and plan is None else None
    applied = options.existing(writing, output, lambda: stage.existing(output, opened, chosen, plan))
    if applied is None:
        with console.progress(not writing.quiet) as on_progress:
            applied = stage.apply(opened, chosen, output, batches, plan, on_progress)
    if not writing.quiet:
        show_applied(applied)
    if writing.json:
        console.emit_json({"model": str(output), **applied_facts(applied)})
    else:
        console.data(str(output))
