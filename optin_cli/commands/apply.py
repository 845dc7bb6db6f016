"""`optin apply`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optin_cli import console
from optin_cli.artefacts.mask import read_mask
from optin_cli.commands import options
from optin_cli.errors import UsageError, param
from optin_cli.sizes import byte_count

if TYPE_CHECKING:
    from optin_cli.compensation.settings import Compensation
    from optin_cli.export.apply import Applied


def apply(
    model: options.Model,
    mask_file: Annotated[Path, typer.Argument(metavar="MASK", help="Written by `optin select`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Model directory to write.")],
    compensate: options.Compensate = "auto",
    producers: options.Producers = True,
    bn: options.Bn = False,
    data: options.OptionalData = None,
    split: Annotated[str | None, typer.Option("--split", help="Split of the data (default: train).")] = None,
    config: options.Config = None,
    text: options.Text = None,
    image: options.Image = None,
    audio: options.Audio = None,
    mask: options.Mask = None,
    workers: options.Workers = None,
    samples: Annotated[
        int | None,
        typer.Option("--samples", help="Examples to compensate on (default: 2048, or what there is)."),
    ] = None,
    batch_size: options.BatchSize = 32,
    max_length: options.MaxLength = None,
    memory: Annotated[
        str, typer.Option("--memory", help="Activations to hold in main memory; the rest goes to disk.")
    ] = "4GiB",
    task: options.Task = None,
    family: options.Anatomy = None,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    force: options.Force = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
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
    from optin_cli.export import apply as stage
    from optin_cli.export.check import open_check

    settings = compensation(
        compensate, samples, batch_size, max_length, seed, memory, bn, producers=producers
    )
    chosen = read_mask(mask_file)
    opened = options.open_with(model, task, family, device, "float32")
    if not data and any(given is not None for given in (split, config, text, image, audio, mask)):
        raise UsageError(
            "--split, --config, --text, --image, --audio and --mask say how to read --data, which is not given"
        )
    rows = (
        options.data_spec(
            data, split or "train", config, text, None, image, workers=workers, mask=mask, audio=audio
        )
        if data
        else None
    )
    stage.check_fit(opened, chosen)
    stage.check_output(output, opened)
    plan = make_plan(opened, chosen, settings, rows, at_most=samples is None, workers=workers)
    batches = open_check(opened, rows) if rows and plan is None else None
    applied = None if force else stage.existing(output, opened, chosen, plan)
    if applied is None:
        with console.progress(not quiet) as on_progress:
            applied = stage.apply(opened, chosen, output, batches, plan, on_progress)
    if not quiet:
        tell(applied)
    if json:
        console.emit_json({"model": str(output), **describe(applied)})
    else:
        console.data(str(output))


def compensation(
    method: str,
    samples: int | None,
    batch_size: int,
    max_length: int | None,
    seed: int,
    memory: str,
    bn: bool,
    prefix: str = "",
    *,
    producers: bool,
) -> Compensation:
    """The options of compensation as one value; `samples` None is the default. `prefix` begins their names."""
    from optin_cli.compensation.settings import Compensation

    if samples is not None and samples < 1:
        raise UsageError(f"{param(f'{prefix}samples', samples)}: at least 1 is needed")
    bytes_held = byte_count(memory, f"{prefix}memory")
    chosen = Compensation(
        method=method,
        producers=producers,
        batch_size=batch_size,
        max_length=max_length,
        bn=bn,
        seed=seed,
        memory=bytes_held,
    )
    return chosen if samples is None else replace(chosen, samples=samples)


def tell(applied: Applied) -> None:
    if applied.reused:
        console.note(f"{applied.path} is already this model under this mask")
        return
    if applied.fits:
        console.table("compensation", FIT_COLUMNS, fit_rows([asdict(fit) for fit in applied.fits]))
    console.note(
        f"{console.count(applied.params)} of {console.count(applied.dense_params)} parameters left; sliced equals "
        f"masked to {applied.deviation:.1e} on {applied.checked_on} (allowed: {applied.tolerance:.0e})"
    )


def describe(applied: Applied) -> dict[str, object]:
    return {
        "reused": applied.reused,
        "deviation": applied.deviation,
        "tolerance": applied.tolerance,
        "checked_on": applied.checked_on,
        "params": applied.params,
        "dense_params": applied.dense_params,
        "compensation": [asdict(fit) for fit in applied.fits],
    }


FIT_COLUMNS = ("site", "error before", "after", "kept", "ridge", "units before", "after", "rows", "")


def fit_rows(fits: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Rows of a table under `FIT_COLUMNS` from what `optin.json` records: one a site, its consumer and, as a mean, the
    units that its producers make."""
    rows = []
    for site, group in groupby(fits, key=lambda fit: fit["site"]):
        *made, consumer = group
        units = [sum(fit[when] for fit in made) / len(made) if made else None for when in ("before", "after")]
        rows.append(
            [
                site,
                _percent(consumer["before"]),
                _percent(consumer["after"]),
                consumer["method"],
                "" if consumer["ridge"] is None else f"{consumer['ridge']:.0e}",
                *map(_percent, units),
                str(consumer["rows"]),
                consumer["note"],
            ]
        )
    return rows


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f} %"
