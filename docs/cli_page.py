"""Write the reference of the command line, cli.md, from the app: `python docs/cli_page.py`.

Commands, options, defaults and groups are those of `optin --help`. tests/test_docs.py fails where page and app differ.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import typer

from optin_cli.main import app

PAGE = Path(__file__).parent / "cli.md"
INTRO = """\
# Command line

<!-- written by docs/cli_page.py: change the help of the commands instead -->

`optin COMMAND --help` prints the same. Options that mean the same have the same name in every command. Data goes to
stdout, everything else to stderr; [pipelines](guides/pipelines.md) lists the exit codes.

Every option also takes its value from a variable, `--samples` of `optin score` from `OPTIN_SCORE_SAMPLES` or
`OPTIN_SAMPLES`, or from a file, `[tool.optin]` or `optin --config FILE.yaml COMMAND`:
[defaults](guides/pipelines.md#defaults).
"""
VALUES = {str: "TEXT", int: "N", float: "NUMBER", Path: "PATH"}


@dataclass(frozen=True)
class Parameter:
    """An option or argument as its help shows it."""

    names: tuple[str, ...]
    """As typed, the one that turns a switch off last; of an argument its placeholder."""
    argument: bool
    value: str
    """The placeholder of its value; '' of a switch."""
    help: str
    default: str
    panel: str


@cache
def parameters(name: str) -> list[Parameter]:
    """The arguments of a command, then its options; hidden ones and `--help` are left out."""
    command = commands()[name]
    (registered,) = (one for one in app.registered_commands if one.name == name)
    hints = get_type_hints(registered.callback)
    shown = [p for p in command.params if not getattr(p, "hidden", False) and p.name in hints]
    found = [described(parameter, plain_type(hints[parameter.name])) for parameter in shown]
    return sorted(found, key=lambda one: not one.argument)


@cache
def commands() -> dict[str, Any]:
    """Name -> command, in the order of `optin --help`."""
    return dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def described(parameter: Any, kind: type) -> Parameter:
    """One parameter, of values of a plain type."""
    argument = parameter.param_type_name == "argument"
    value = parameter.metavar or VALUES.get(kind, "")
    names = (value,) if argument else (*sorted(parameter.opts, key=len), *parameter.secondary_opts)
    return Parameter(
        names,
        argument,
        "" if argument or kind is bool else value.replace("|", " or "),
        parameter.help or "",
        "needed" if parameter.required else default(parameter.default, names),
        getattr(parameter, "rich_help_panel", None) or "",
    )


def default(value: Any, names: tuple[str, ...]) -> str:
    """What holds where an option is not given; '' where that is nothing, or where its help says it."""
    if value is True:
        return f"`{names[0]}`"
    if value is False and len(names) > 1 and names[-1].startswith("--no-"):
        return f"`{names[-1]}`"
    return f"`{value}`" if isinstance(value, (str, int, float)) and not isinstance(value, bool) else ""


def plain_type(annotation: Any) -> type:
    """`int` of `int | None`, `str` of `list[str] | None`."""
    inner = [part for part in get_args(annotation) if part is not type(None)]
    return plain_type(inner[0]) if inner else annotation


def page() -> str:
    """The whole page."""
    return "\n".join([INTRO, *map(section, commands())])


def section(name: str) -> str:
    """A heading, what the command does, its examples, and a table for each group of its options."""
    words, _, examples = (commands()[name].help or "").partition("Examples:")
    found = parameters(name)
    usage = " ".join(["optin", name, *(one.names[0] for one in found if one.argument), "[OPTIONS]"])
    shown = [line.strip() for line in examples.splitlines() if line.strip()]
    lines = [f"## optin {name}", "", paragraphs(words), ""]
    lines += ["```text", usage, *(["", *shown] if shown else []), "```", ""]
    for panel in dict.fromkeys(one.panel for one in found):
        lines += [f"### {panel}", ""] if panel else []
        lines += table([one for one in found if one.panel == panel])
    return "\n".join(lines)


def table(group: list[Parameter]) -> list[str]:
    """Names, meaning and default."""
    rows = ["| option | meaning | default |", "|---|---|---|"]
    return [*rows, *(f"| {spelling(one)} | {cell(one.help)} | {one.default} |" for one in group), ""]


def spelling(one: Parameter) -> str:
    """`` `-o`, `--output PATH` ``."""
    *others, last = one.names
    return ", ".join(f"`{cell(name)}`" for name in (*others, f"{last} {one.value}".strip()))


def paragraphs(text: str) -> str:
    """Each paragraph on one line."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n") if part.strip())


def cell(text: str) -> str:
    """Text that fits a cell of a table."""
    plain = re.sub(r"\s+", " ", text).strip()
    return plain.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(page())
