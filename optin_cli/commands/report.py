"""`optin report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from optin_cli import console
from optin_cli.commands import options
from optin_cli.commands.groups import Group, everyday

_QUIET = {"quiet": {"help": "Print only the paths that were written."}}


@everyday("output", "png", "csv", "quiet")
def report(
    writing: Annotated[options.Writing, Group(options.Writing, "quiet json", changes=_QUIET)],
    artefacts: Annotated[
        list[Path],
        typer.Argument(
            metavar="RANKING [MASK...] [MODEL...]",
            help="A ranking with masks, pruned models and a latency table; or the folder of a sweep.",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.html", help="Page to write.")
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option("--png", metavar="DIR", help="Write the charts as pictures (needs matplotlib)."),
    ] = None,
    csv: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE.csv", help="Write a row for each model or budget.")
    ] = None,
) -> None:
    """Write one page about a ranking and what came of it: trade-off, what each budget keeps, costs, errors.

    The page is one file that needs no network. Without masks it shows what budgets from 0.9 to 0.2 would keep.

    Examples:

      optin report sweep/ -o report.html

      optin report rankings/minilm.h5 m-60.mask.json m-60/ -o report.html

      optin report sweep/ cpu.json --png pictures/ --csv sweep.csv
    """
    from optin_cli.reporting.write import write

    written = [str(path) for path in write(artefacts, output, png, csv)]
    if writing.json:
        console.emit_json({"written": written})
    else:
        console.data("\n".join(written))
