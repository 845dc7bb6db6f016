"""`optin apply`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optin_cli import console
from optin_cli.artefacts.mask import Mask, read_mask
from optin_cli.commands import options

if TYPE_CHECKING:
    from optin_cli.data.sources import DataSpec
    from optin_cli.models.checkpoint import OpenModel
    from optin_cli.surgery.apply import Applied


def apply(
    model: options.Model,
    mask: Annotated[Path, typer.Argument(metavar="MASK", help="Written by `optin select`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Model directory to write.")],
    data: options.OptionalData = None,
    split: options.Split = "train",
    config: options.Config = None,
    text: options.Text = None,
    image: options.Image = None,
    task: options.Task = None,
    anatomy: options.Anatomy = None,
    device: options.Device = "auto",
    force: options.Force = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Slice the weights: write a smaller model directory that loads again.

    The written model is loaded back and compared with the masked one on calibration rows first.

    Examples:

      optin apply demo:minilm m-60.mask.json -o m-60/

      python -c "import optin_cli; model = optin_cli.load('m-60/')"
    """
    chosen = read_mask(mask)
    opened = options.open_with(model, task, anatomy, device, "float32")
    rows = options.data_spec(data, split, config, text, None, image) if data else None
    applied = apply_or_reuse(opened, chosen, output, rows, force)
    if not quiet:
        tell(applied)
    if json:
        console.emit_json({"model": str(output), **describe(applied)})
    else:
        console.data(str(output))


def apply_or_reuse(model: OpenModel, mask: Mask, output: Path, rows: DataSpec | None, force: bool) -> Applied:
    """Apply, unless `output` is the result already."""
    from optin_cli.surgery import apply as stage

    stage.check_belongs(model, mask)
    stage.check_output(output, model)
    found = None if force else stage.existing(output, model, mask)
    return found or stage.apply(model, mask, output, rows)


def tell(applied: Applied) -> None:
    if applied.reused:
        console.note(f"{applied.path} is already this model under this mask")
        return
    console.note(
        f"{console.count(applied.params)} of {console.count(applied.dense_params)} parameters left; sliced equals "
        f"masked to {applied.deviation:.1e} on {applied.checked_on}"
    )


def describe(applied: Applied) -> dict[str, object]:
    return {
        "reused": applied.reused,
        "deviation": applied.deviation,
        "checked_on": applied.checked_on,
        "params": applied.params,
        "dense_params": applied.dense_params,
    }
