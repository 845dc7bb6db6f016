"""`optin config`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from optin_cli import console
from optin_cli.commands import defaults, options
from optin_cli.errors import UsageError


def config(
    writing: options.Shown,
    command: Annotated[
        str | None,
        typer.Argument(metavar="[COMMAND]", help="Show every option of one command.", show_default=False),
    ] = None,
) -> None:
    """Print what options are set to, and where each value comes from: the environment, a file or a default.

    Flags come first, then OPTIN_<COMMAND>_<OPTION> and OPTIN_<OPTION>, then the file: [tool.optin] in the nearest
    pyproject.toml, or `optin --config FILE.yaml`. Without COMMAND only what is set somewhere is listed.

    Examples:

      optin config

      optin config score

      OPTIN_DEVICE=cpu optin config score --json
    """
    found = defaults.current()
    if command is not None and command not in found.commands:
        raise UsageError(f"{command} is no command of optin", f"commands: {', '.join(found.commands)}")
    chosen = {name: one for name, one in found.commands.items() if command in (None, name)}
    rows = [row for name, one in chosen.items() for row in _rows(name, one, found)]
    if writing.json:
        console.emit_json({"file": found.path and str(found.path), "options": rows})
        return
    console.note(f"file: {found.path or 'none'}")
    shown = [row for row in rows if command is not None or row["source"] != "default"]
    cells = [
        [f"{row['command']} {row['option']}", _text(row["value"]), row["source"], row["origin"]]
        for row in shown
    ]
    console.table("", ["option", "value", "from", ""], cells, numbers=False, stdout=True)


def _rows(name: str, command: Any, found: defaults.Defaults) -> Iterator[dict[str, Any]]:
    """One for each option of a command. Raises `UsageError` for a value that it does not take."""
    context = typer.Context(command, info_name=name, default_map=dict(found.values().get(name, {})))
    for parameter in command.params:
        if parameter.param_type_name != "option" or parameter.name == "help":
            continue
        source, origin = found.origin(name, parameter)
        value = parameter.default if source == "default" else _value(context, parameter, origin)
        yield {
            "command": name,
            "option": f"--{defaults.option_name(parameter)}",
            "value": _plain(value),
            "source": source,
            "origin": origin,
        }


def _value(context: typer.Context, parameter: Any, origin: str) -> Any:
    value = parameter.value_from_envvar(context)
    if value is None:
        value = context.lookup_default(parameter.name)
    try:
        return parameter.process_value(context, value)
    except typer.BadParameter as error:
        raise UsageError(f"{origin}: {error.message}") from error


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, str | bool | int | float | None) else None


def _text(value: Any) -> str:
    return "" if value is None else str(value)
