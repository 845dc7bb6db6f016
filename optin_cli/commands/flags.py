"""The flags of the command line, by the parameter that each sets: how an error of the library is told there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import typer

from optin_cli.errors import Spelling


def flags_of(command: Callable[..., Any]) -> dict[str, tuple[str, ...]]:
    """Parameter -> its flag, of a switch with the one that turns it off: `--sketch`, `--no-sketch`."""
    app = typer.Typer(add_completion=False)
    app.command()(command)
    found: dict[str, tuple[str, ...]] = {}
    for option in typer.main.get_command(app).params:
        if option.param_type_name == "option" and option.name is not None:
            found[option.name] = (option.opts[0], *option.secondary_opts[:1])
    return found


def spelling_of(command: Callable[..., Any], others: Iterable[Callable[..., Any]]) -> Spelling:
    """How a command's errors write parameters: with its flags, or those of `others` for what it has no option for."""
    flags: dict[str, tuple[str, ...]] = {}
    for other in (*others, command):
        flags |= flags_of(other)

    def spell(name: str, shown: str | None, written: str | None) -> str:
        flag = flags.get(name, (f"--{name.replace('_', '-')}",))
        if shown == "False":
            return flag[-1]
        return flag[0] if shown in (None, "True") else f"{flag[0]} {shown}"

    return spell
