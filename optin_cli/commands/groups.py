"""Options made from the fields of settings, and commands that are handed the settings themselves.

A command is a plain function. Typer sees a signature generated from it: a parameter that is annotated with a `Group`
becomes one option for each field, and the function gets what the group makes of them::

    @everyday("samples")
    def score(model: Model, settings: Annotated[ScoreSettings, Group(ScoreSettings)]) -> None: ...

    app.command()(as_command(score))

A field is an option if its metadata has a `help`. The metadata may also have the `name` of the parameter (by default
the field's), a `flag` (by default that name; `switch` adds `--no-...`, `short` a letter), a `metavar`, a `panel` of
the help, and `least`, the smallest number that it takes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from copy import copy
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import typer
from typer.models import ArgumentInfo, OptionInfo

from optin_cli.errors import OptinError, Spelling, UsageError, spelled
from optin_cli.sizes import check_finite, check_numbers

Command = Callable[..., None]
AnyCommand = TypeVar("AnyCommand", bound=Command)
PANELS = (
    None,
    "Model",
    "Budget",
    "Selection",
    "Calibration",
    "Data",
    "Scoring",
    "Compensation",
    "Timing",
    "Machine",
    "Output",
)
"""The panels of a command's help, in their order. None: the first one, of what everyone needs."""


@dataclass(frozen=True)
class Text:
    """How a field is read from the command line, where its own type can't be typed there."""

    read: Callable[[Any, str], Any]
    """(value, name of the parameter) -> the field. Not called for None."""
    default: str | None = None
    type: type[str] | type[Path] = str


class Group:
    """The fields of `settings` as options.

    Args:
        settings: a dataclass.
        only: the fields to take, by default all that have a `help`.
        without: fields to leave out.
        shared: fields that take the option of another group of the command.
        panel: where the help has those that name no panel.
        changes: field -> what its metadata, or its `default`, is in this command.
        texts: fields that are read from text.
        make: called with the fields; by default `settings`.
    """

    def __init__(
        self,
        settings: type,
        only: str | None = None,
        *,
        without: str = "",
        shared: str = "",
        panel: str | None = None,
        changes: Mapping[str, Mapping[str, Any]] | None = None,
        texts: Mapping[str, Text] | None = None,
        make: Callable[..., Any] | None = None,
    ) -> None:
        self.settings, self.panel = settings, panel
        self.only = only and only.split()
        self.without, self.shared = without.split(), shared.split()
        self.changes, self.texts = changes or {}, texts or {}
        self.make = make or settings

    def names(self) -> dict[str, str]:
        """Field -> the parameter that sets it."""
        described = {field.name: self._described(field) for field in fields(self.settings)}
        taken = self.only or [name for name, metadata in described.items() if "help" in metadata]
        return {
            name: described[name].get("name", name)
            for name in dict.fromkeys([*taken, *self.shared])
            if name not in self.without
        }

    def parameters(self) -> list[inspect.Parameter]:
        """One for each option."""
        names = self.names()
        return [
            self._parameter(field, names[field.name])
            for field in fields(self.settings)
            if field.name in names and field.name not in self.shared
        ]

    def build(self, given: Mapping[str, Any]) -> Any:
        """What the options' values make, parameter -> value. An error names the parameters of this command."""
        try:
            values = self.values(given)
            check_numbers(self.settings, values)
            return self.make(**values)
        except OptinError as error:
            error.rename(self.names())
            raise

    def values(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Field -> value, of parameter -> value."""
        found, several = {}, {field.name for field in fields(self.settings) if field.default == ()}
        for field, name in self.names().items():
            value = given[name]
            if field in self.texts:
                value = None if value is None else self.texts[field].read(value, name)
            elif field in several:
                value = tuple(value or ())
            found[field] = value
        return found

    def _described(self, field: Field[Any]) -> dict[str, Any]:
        """A field's metadata and default, as this command has them."""
        default = self.texts[field.name].default if field.name in self.texts else field.default
        return {"default": default, **field.metadata, **self.changes.get(field.name, {})}

    def _parameter(self, field: Field[Any], name: str) -> inspect.Parameter:
        described = self._described(field)
        default, hint = described["default"], _hints(self.settings)[field.name]
        if field.name in self.texts:
            hint = self.texts[field.name].type
        elif default == ():
            hint = list[str]
        required = default is MISSING
        if default is None or default == ():
            default, hint = None, hint | None
        flag = described.get("flag", name.replace("_", "-"))
        info = typer.Option(
            f"--{flag}/--no-{flag}" if described.get("switch") else f"--{flag}",
            *described.get("short", "").split(),
            help=spelled(described["help"], flag_of),
            metavar=described.get("metavar"),
            rich_help_panel=described.get("panel", self.panel),
        )
        return option(name, hint, info, inspect.Parameter.empty if required else default)


@functools.cache
def _hints(settings: type) -> dict[str, Any]:
    return get_type_hints(settings)


def flag_of(name: str, *_: object) -> str:
    """Of a parameter whose flag has its name: those that the help of others refers to."""
    return f"--{name.replace('_', '-')}"


def option(name: str, hint: Any, info: Any, default: Any) -> inspect.Parameter:
    """A parameter as typer reads it."""
    return _as_option(name, Annotated[hint, info], default)


def _as_option(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


@dataclass(frozen=True)
class Within:
    """What a command is handed and runs within, such as a team of processes: no option."""

    enter: Callable[[], AbstractContextManager[Any]]


def everyday(*names: str) -> Callable[[AnyCommand], AnyCommand]:
    """The parameters that everyone needs: a command's help begins with their options."""

    def mark(command: AnyCommand) -> AnyCommand:
        vars(command)["everyday"] = names
        return command

    return mark


def as_command(function: Command) -> Command:
    """The function with the signature that typer reads: every group as its options, by the panel of the help.

    Groups are built in the order of the function's parameters. Raises `UsageError` where two options have one name.
    """
    if "__signature__" in vars(function):
        return function
    hints = get_type_hints(function, include_extras=True)
    sources = {name: _source(hints[name]) for name in inspect.signature(function).parameters}
    found: dict[str, inspect.Parameter] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        source = sources[name]
        if isinstance(source, Group):
            made = source.parameters()
        else:
            made = [] if source else [_as_option(name, hints[name], parameter.default)]
        for one in made:
            if one.name in found:
                raise UsageError(f"two options of one command set {one.name}")
            found[one.name] = one

    @functools.wraps(function)
    def run(**given: Any) -> None:
        for name, value in given.items():
            check_finite(name, value)
        with ExitStack() as stack:
            arguments: dict[str, Any] = {}
            for name, source in sources.items():
                if isinstance(source, Within):
                    arguments[name] = stack.enter_context(source.enter())
                else:
                    arguments[name] = source.build(given) if source else given[name]
            function(**arguments)

    ordered = _ordered(list(found.values()), vars(function).get("everyday", ()))
    vars(run)["__signature__"] = inspect.Signature(ordered)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in ordered}
    return run


def flags_of(command: Command) -> dict[str, tuple[str, ...]]:
    """Parameter -> its flag, of a switch with the one that turns it off: `--sketch`, `--no-sketch`."""
    found = {}
    for name, parameter in inspect.signature(as_command(command)).parameters.items():
        info = _info(parameter)
        if isinstance(info, OptionInfo):
            # where `Option` annotates, its first flag is in the place of the default
            found[name] = tuple(str(info.default).split("/"))
    return found


def spelling_of(command: Command, others: Iterable[Command]) -> Spelling:
    """How a command's errors write parameters: with its flags, or those of `others` for what it has no option for."""
    known = [command, *reversed(list(others))]

    def spell(name: str, shown: str | None, written: str | None) -> str:
        flag = next((flags[name] for flags in map(flags_of, known) if name in flags), (flag_of(name),))
        if shown == "False":
            return flag[-1]
        return flag[0] if shown in (None, "True") else f"{flag[0]} {shown}"

    return spell


def _source(hint: Any) -> Group | Within | None:
    """What makes a parameter of a command; None for a plain option or argument."""
    return next((one for one in get_args(hint) if isinstance(one, Group | Within)), None)


def _info(parameter: inspect.Parameter) -> Any:
    """Typer's description of a parameter."""
    return get_args(parameter.annotation)[-1]


def _ordered(parameters: list[inspect.Parameter], first: Sequence[str]) -> list[inspect.Parameter]:
    """The `first` of all, then panel by panel."""

    def place(parameter: inspect.Parameter) -> tuple[int, int]:
        info = _info(parameter)
        if isinstance(info, ArgumentInfo):
            return -1, 0
        if parameter.name in first:
            return 0, first.index(parameter.name)
        return PANELS.index(info.rich_help_panel), len(first)

    return [_in_first(one) if one.name in first else one for one in sorted(parameters, key=place)]


def _in_first(parameter: inspect.Parameter) -> inspect.Parameter:
    """The same option in the first panel of the help."""
    hint, info = get_args(parameter.annotation)
    info = copy(info)
    info.rich_help_panel = PANELS[0]
    return parameter.replace(annotation=Annotated[hint, info])
