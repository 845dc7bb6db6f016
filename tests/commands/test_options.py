"""The options of every command: names, defaults and types are a contract, held by a snapshot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer

from optin_cli.main import COMMANDS, app

SNAPSHOT = Path(__file__).with_name("options.json")
"""Command -> parameter -> what it is. After a change that is meant: `python tests/commands/test_options.py`."""


def described(parameter: Any, annotation: Any) -> dict[str, Any]:
    """One option or argument as plain data. No default and a default of None are the same to whoever types."""
    default = parameter.default
    if parameter.param_type_name == "argument" or type(default).__name__ == "Sentinel":
        default = None
    return {
        "kind": parameter.param_type_name,
        "names": sorted(parameter.opts),
        "off": sorted(parameter.secondary_opts),
        "type": typed(annotation),
        "default": default,
        "required": parameter.required,
        "multiple": bool(getattr(parameter, "multiple", False)),
        "metavar": parameter.metavar,
    }


def typed(annotation: Any) -> str:
    """`int` of `int | None`, `str` of `list[str] | None`."""
    inner = [part for part in get_args(annotation) if part is not type(None)]
    return typed(inner[0]) if inner else annotation.__name__


def options_now() -> dict[str, dict[str, Any]]:
    made = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    hints = {command.name: get_type_hints(command.callback) for command in app.registered_commands}
    return {
        name: {p.name: described(p, hints[name][p.name]) for p in command.params}
        for name, command in made.items()
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_the_options_that_it_ever_had(name):
    assert options_now()[name] == json.loads(SNAPSHOT.read_text())[name]


def test_the_snapshot_knows_every_command():
    assert set(json.loads(SNAPSHOT.read_text())) == set(COMMANDS)


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps(options_now(), indent=1, sort_keys=True) + "\n")
