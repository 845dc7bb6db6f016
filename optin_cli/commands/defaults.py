"""Defaults of options: flags come first, then variables of the environment, then a file.

`OPTIN_SCORE_SAMPLES` is `--samples` of `optin score`, `OPTIN_SAMPLES` that of every command with such an option. A file
holds the same: a key is an option without its dashes, a table has those of one command. It is `[tool.optin]` in the
nearest pyproject.toml, or what `optin --config FILE.yaml` names. Values are read as if they had been typed.
"""

from __future__ import annotations

import difflib
import inspect
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_args

from typer.models import OptionInfo

from optin_cli.artefacts.kinds import load_yaml
from optin_cli.errors import Spelling, UsageError

PREFIX, TABLE, PYPROJECT = "OPTIN_", "tool.optin", "pyproject.toml"
FILE_VARIABLE = "OPTIN_CONFIG"
"""Names the file: the option `--config` of data is set by the variable of its command alone."""
BY_HAND = {"trust-remote-code"}
"""Options that are typed or not given: a file that comes with a model, or a variable, runs no code."""
_OTHERS = {FILE_VARIABLE, "OPTIN_DEBUG", "OPTIN_RANKINGS", "OPTIN_DRY_RUN"}
"""Variables that are no options."""
_MOST = 2**20
"""Bytes of the largest pyproject.toml that is read."""


@dataclass(frozen=True)
class Entry:
    """One value of a file."""

    value: Any
    key: str
    """As it is written there: `score.samples`."""


@dataclass(frozen=True)
class Defaults:
    """What a file says, and the commands that it is about."""

    commands: Mapping[str, Any]
    """Name -> command, as typer makes it."""
    path: Path | None = None
    entries: Mapping[str, Mapping[str, Entry]] = field(default_factory=dict)
    """Command -> parameter -> its value."""

    def values(self) -> dict[str, dict[str, Any]]:
        """Command -> parameter -> value: the `default_map` of a context."""
        return {
            command: {name: entry.value for name, entry in entries.items()}
            for command, entries in self.entries.items()
        }

    def origin(self, command: str, parameter: Any) -> tuple[str, str]:
        """(`environment`, `file` or `default`; where exactly): the source of an option that was not typed."""
        if variable := next((name for name in parameter.envvar or () if os.environ.get(name)), None):
            return "environment", variable
        if entry := self.entries.get(command, {}).get(parameter.name):
            return "file", f"{entry.key} in {self.path}"
        return "default", ""


_current: ContextVar[Defaults] = ContextVar("defaults")
_origins: ContextVar[Mapping[str, str] | None] = ContextVar("origins", default=None)


def current() -> Defaults:
    """What is in force in this run."""
    return _current.get()


def use(found: Defaults) -> None:
    _current.set(found)


# ---- variables ----


def with_variables(parameters: Sequence[inspect.Parameter], command: str) -> list[inspect.Parameter]:
    """The parameters of a command; each option also takes its value from the environment."""
    return [_with_variables(parameter, command) for parameter in parameters]


def _with_variables(parameter: inspect.Parameter, command: str) -> inspect.Parameter:
    *rest, info = get_args(parameter.annotation)
    # where `Option` annotates, its first flag is in the place of the default
    name = str(info.default).split("/")[0].removeprefix("--") if isinstance(info, OptionInfo) else ""
    if not name or name in BY_HAND:
        return parameter
    info = copy(info)
    both = (_variable(f"{command}-{name}"), _variable(name))
    info.envvar, info.show_envvar = [one for one in both if one not in _OTHERS], False
    return parameter.replace(annotation=Annotated[rest[0], info])


def _variable(name: str) -> str:
    return PREFIX + name.replace("-", "_").upper()


def unknown_variables(commands: Mapping[str, Any]) -> list[str]:
    """One message for each variable that looks like an option and is none."""
    known = {name for _, _, one in _options(commands) for name in one.envvar or ()} | _OTHERS
    odd = sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)
    return [f"{name} sets nothing: no command has such an option{_nearest(name, known)}" for name in odd]


def _nearest(name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


# ---- files ----


def read_defaults(path: Path | None, commands: Mapping[str, Any]) -> Defaults:
    """The defaults of `path`, or of the nearest pyproject.toml that has some.

    Raises `UsageError` for a file that can't be read, unknown keys, and values that no option takes.
    """
    if path is None:
        path = _nearest_project()
        content = None if path is None else _toml(path)
    elif path.suffix.lower() == ".toml":
        content = _toml(path)
        if content is None:
            raise UsageError(f"{path} has no table [{TABLE}]")
    else:
        content = _yaml(path)
    if path is None or content is None:
        return Defaults(commands)
    return Defaults(commands, path, _entries(content, path, commands))


def _nearest_project() -> Path | None:
    here = Path.cwd()
    return next(
        (folder / PYPROJECT for folder in (here, *here.parents) if (folder / PYPROJECT).is_file()), None
    )


def _toml(path: Path) -> dict[str, Any] | None:
    """`[tool.optin]`; None where there is none. A pyproject.toml that does not mention optin is not looked into."""
    try:
        with path.open("rb") as stream:
            content = stream.read(_MOST)
    except OSError as error:
        if path.name == PYPROJECT:
            return None
        raise UsageError(f"can't read {path}: {error.strerror}") from error
    if b"optin" not in content:
        return None
    try:
        data: Any = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not TOML: {error}") from error
    for part in TABLE.split("."):
        data = data.get(part) if isinstance(data, dict) else None
    return _table(data, path) if data is not None else None


def _yaml(path: Path) -> dict[str, Any]:
    try:
        return _table(load_yaml(path) or {}, path)
    except OSError as error:
        raise UsageError(f"can't read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path} is not YAML: {error}") from error


def _table(data: Any, path: Path) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise UsageError(f"{path} holds a {type(data).__name__} where a table of options is needed")
    return data


def _entries(
    content: Mapping[Any, Any], path: Path, commands: Mapping[str, Any]
) -> dict[str, dict[str, Entry]]:
    found: dict[str, dict[str, Entry]] = {name: {} for name in commands}
    tables = {key: value for key, value in content.items() if isinstance(value, dict)}
    for key, value in content.items():
        if key not in tables:
            for name, one, entry in _places(str(key), value, path, commands):
                found[name][one] = entry
    for command, table in tables.items():  # after what holds for all
        if command not in commands:
            raise UsageError(
                f"{path}: {command} is no command of optin{_nearest(str(command), set(commands))}",
                "a table holds the options of one command",
            )
        for key, value in table.items():
            for name, one, entry in _places(
                str(key), value, path, {command: commands[command]}, f"{command}."
            ):
                found[name][one] = entry
    return found


def _places(
    key: str, value: Any, path: Path, commands: Mapping[str, Any], where: str = ""
) -> Iterator[tuple[str, str, Entry]]:
    """(command, parameter, entry) of every option that a key sets."""
    option = key.replace("_", "-")
    if option in BY_HAND:
        raise UsageError(f"{path}: {where}{key} can't be set in a file", f"give --{option} yourself")
    hit = False
    for name, flag, parameter in _options(commands):
        if flag == option:
            hit = True
            yield (
                name,
                parameter.name,
                Entry(_as_typed(value, parameter, f"{path}: {where}{key}"), where + key),
            )
    if not hit:
        known = {flag for _, flag, _ in _options(commands)}
        whose = f"`optin {where[:-1]}`" if where else "any command"
        raise UsageError(
            f"{path}: {where}{key} is no option of {whose}{_nearest(option, known)}",
            "keys are options without their dashes: `optin config` lists them",
        )


def _as_typed(value: Any, parameter: Any, where: str) -> Any:
    """A value as the command line would have it: text, or several. Raises `UsageError` for what can't be typed."""
    if parameter.is_flag:
        if isinstance(value, bool):
            return value
        raise UsageError(f"{where} is a switch: true or false, not {value!r}")
    if isinstance(value, list) and all(type(one) in (str, int, float) for one in value):
        return [str(one) for one in value] if parameter.multiple else ",".join(map(str, value))
    if type(value) not in (str, int, float):
        raise UsageError(f"{where} is {value!r}: a text or a number is needed")
    return [str(value)] if parameter.multiple else str(value)


def _options(commands: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(command, name without dashes, option) of each, but for `--help`."""
    for name, command in commands.items():
        for parameter in command.params:
            if parameter.param_type_name == "option" and parameter.name != "help":
                yield name, option_name(parameter), parameter


def option_name(parameter: Any) -> str:
    """`samples` of `--samples`, `output` of `-o`, `--output`."""
    return max(parameter.opts, key=len).lstrip("-")


# ---- where values come from ----


@contextmanager
def known(context: Any) -> Iterator[None]:
    """While a command runs, its errors can say where the value of an option came from."""
    before = _origins.set(
        {one.name: where for one in context.command.params if (where := came_from(context, one))}
    )
    try:
        yield
    finally:
        _origins.reset(before)


def came_from(context: Any, parameter: Any) -> str:
    """`OPTIN_SAMPLES`, or `score.samples in conf.yaml`; '' for what was typed, and for defaults."""
    source = parameter is not None and context.get_parameter_source(parameter.name)
    if not source or source.name not in ("ENVIRONMENT", "DEFAULT_MAP"):
        return ""
    return current().origin(context.info_name or "", parameter)[1]


def remarks(parameters: Sequence[str], spelling: Spelling) -> list[str]:
    """One line for each of the parameters that nobody typed."""
    origins = _origins.get() or {}
    return [
        f"{spelling(name, None, None)} comes from {origins[name]}" for name in parameters if name in origins
    ]


def is_typed(parameter: str) -> bool:
    """Whether the value of a parameter of the command that runs is neither from a file nor from the environment."""
    return parameter not in (_origins.get() or {})
