"""The options of every command: names, defaults and types are a contract, held by a snapshot."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import pytest
import typer
from helpers.cli import run
from rich.markup import escape
from typer.testing import CliRunner

from optin_cli.commands import groups
from optin_cli.commands.groups import Group, Text, as_command
from optin_cli.errors import UsageError, param
from optin_cli.main import COMMANDS, app
from optin_cli.sizes import byte_count

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


@cache
def made() -> dict[str, Any]:
    """Name -> command, as `optin` has them."""
    return typer.main.get_command(app).commands  # type: ignore[attr-defined]


def options_now() -> dict[str, dict[str, Any]]:
    hints = {command.name: get_type_hints(command.callback) for command in app.registered_commands}
    return {
        name: {p.name: described(p, hints[name][p.name]) for p in command.params}
        for name, command in made().items()
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_the_options_that_it_ever_had(name):
    assert options_now()[name] == json.loads(SNAPSHOT.read_text())[name]


def test_the_snapshot_knows_every_command():
    assert set(json.loads(SNAPSHOT.read_text())) == set(COMMANDS)


# ---- help ----


def panels(name: str) -> dict[str | None, list[Any]]:
    command = made()[name]
    found: dict[str | None, list[Any]] = {}
    for parameter in command.params:
        if parameter.param_type_name == "option":
            found.setdefault(parameter.rich_help_panel, []).append(parameter)
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_help_begins_with_what_everyone_needs(name):
    found = panels(name)
    assert len(found.get(None, [])) <= 6
    assert not any(p.required for panel, parameters in found.items() if panel for p in parameters)
    assert list(found) == [panel for panel in groups.PANELS if panel in found]
    shown = run(name, "--help").stdout
    places = [shown.index(f"─ {panel or 'Options'} ─") for panel in found]
    assert places == sorted(places)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("width", ["80", "120"])
def test_help_shows_every_option_whole(name, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", width)
    shown = run(name, "--help").stdout
    words = set(shown.replace(",", " ").split())
    for parameter in (p for parameters in panels(name).values() for p in parameters):
        assert {*parameter.opts, *parameter.secondary_opts} <= words
        assert escape(parameter.help) == parameter.help  # rich takes nothing in it for markup
    assert max(map(len, shown.splitlines())) <= int(width)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_a_function_of_a_few_groups(name):
    assert len(inspect.signature(COMMANDS[name]).parameters) <= 10


# ---- groups ----


@dataclass(frozen=True)
class Settings:
    count: int = field(default=2, metadata={"help": "How many."})
    size: int = field(default=1024, metadata={"help": "How large.", "name": "room"})
    names: tuple[str, ...] = field(default=(), metadata={"help": "Which."})
    fast: bool = field(default=True, metadata={"help": "Soon.", "switch": True})
    kept: int = 7

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"{param('size', self.size)} is too small", f"leave {param('size')} out")


def called(only: str | None = None, *args: str, **options: Any) -> tuple[Any, Any]:
    """What a command with one group is handed, and the result."""
    handed = []

    def command(settings: Any, count: int) -> None:
        handed.append((settings, count))

    command.__annotations__ = {
        "settings": Annotated[Settings, Group(Settings, only, shared="count", **options)],
        "count": Annotated[int, typer.Option("--count")],
    }
    made = typer.Typer()
    made.command()(as_command(command))
    return CliRunner().invoke(made, ["--count", "3", *args]), handed


def test_a_group_makes_its_settings():
    result, handed = called(None, "--room", "5", "--names", "a", "--names", "b", "--no-fast")
    assert result.exit_code == 0, result.output
    assert handed == [(Settings(3, 5, ("a", "b"), False), 3)]  # `count` is the other option's
    _, handed = called("fast", without="size")
    assert handed == [(Settings(3), 3)]


def test_a_group_reads_text_and_changes_defaults():
    texts = {"size": Text(byte_count, default="2KiB")}
    assert called(None, texts=texts)[1] == [(Settings(3, 2048), 3)]
    assert called(None, "--room", "1MiB", texts=texts)[1] == [(Settings(3, 1 << 20), 3)]
    result, _ = called(None, "--room", "much", texts=texts)
    assert isinstance(result.exception, UsageError) and result.exception.params == ["room"]
    assert called(None, changes={"size": {"default": 9}})[1] == [(Settings(3, 9), 3)]


def test_errors_of_settings_name_the_command_s_parameters():
    result, _ = called(None, "--room", "0")
    assert isinstance(result.exception, UsageError)
    assert (result.exception.what, result.exception.hint) == ("room=0 is too small", "leave room out")


def test_two_options_for_one_parameter_are_refused():
    def command(settings: Any, count: int) -> None: ...

    command.__annotations__ = {
        "settings": Annotated[Settings, Group(Settings)],
        "count": Annotated[int, typer.Option("--count")],
    }
    with pytest.raises(UsageError, match="two options of one command set count"):
        as_command(command)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (
            ["prune", "demo:minilm", "--data", "d", "--flops", "0.5", "--compensate-samples", 0],
            "--compensate-samples 0",
        ),
        (["prune", "demo:minilm", "--data", "d", "--flops", "0.5", "--samples", 0], "--samples 0"),
        (
            ["prune", "demo:minilm", "--data", "d", "--flops", "0.5", "--compensate-memory", "x"],
            "--compensate-memory 'x'",
        ),
        (["score", "demo:minilm", "--data", "d", "--workers", -1], "--workers -1"),
        (["prune", "demo:minilm", "--data", "d", "--tokens", "few"], "--tokens 'few'"),
    ],
)
def test_wrong_values_are_said_as_they_were_typed(args, says, tmp_path):
    assert says in run(*args, "-o", tmp_path / "out", code=2).stderr
    assert list(tmp_path.iterdir()) == []


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps(options_now(), indent=1, sort_keys=True) + "\n")
