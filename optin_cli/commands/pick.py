"""`optin pick`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from optin_cli import console
from optin_cli.artefacts.point import read_sweep
from optin_cli.commands import options
from optin_cli.commands.groups import Group, Text, everyday
from optin_cli.commands.present import point_facts
from optin_cli.errors import UsageError, param
from optin_cli.trials.pick import Promise
from optin_cli.trials.pick import pick as choose


def milliseconds(text: str, name: str) -> float:
    """`8ms` or `8` -> 8.0. Raises `UsageError` for anything else."""
    try:
        return float(text.removesuffix("ms"))
    except ValueError as error:
        raise UsageError(
            f"{param(name, meta=repr(text))} is not a number of milliseconds",
            f"write {param(name, meta='8ms')}",
        ) from error


@everyday("max_drop", "min_speedup", "max_latency", "batch_size")
def pick(
    sweep: Annotated[Path, typer.Argument(metavar="SWEEP", help="Folder written by `optin sweep`.")],
    promise: Annotated[Promise, Group(Promise, texts={"max_latency": Text(milliseconds)})],
    writing: options.Shown,
) -> None:
    """Print the directory of the best model of a sweep that keeps a promise; exit with 5 if none does.

    With --max-drop that is the one of the fewest MACs, otherwise the one that loses least. Promises that are given
    together hold together.

    Examples:

      optin pick sweep/ --max-drop 1.0

      optin pick sweep/ --min-speedup 1.5

      optin pick sweep/ --max-latency 8ms --max-drop 2
    """
    promise.check()
    found = read_sweep(sweep)
    best = choose(found.main, promise, str(sweep))
    if writing.json:
        console.emit_json(point_facts(found, best))
        return
    console.note(f"{best.name}: {promise.measured(best)}")
    console.data(str(found.directory(best)))
