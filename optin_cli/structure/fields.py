"""Dataclasses whose fields say what they hold, so that no other place has to list them.

A field says it in its metadata, and its docstring says what that means:

    carried: tuple[str, ...] = field(default=(), metadata=holds(PATHS))

From both follow `problems` (check plain data), `from_plain` (read it), `shortened` (write it), `map_paths` (change
every path) and the tables of docs/anatomy.md (docs/field_tables.py). All of them leave fields without `holds` alone.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, replace
from typing import Any, Protocol, TypeVar

Schema = TypeVar("Schema")
"""A dataclass with fields that `holds` describes."""
ChangePath = Callable[[str], str]


class Kind(Protocol):
    """The values that a field holds: `Plain`, `DottedPath`, `Listed`, `Keyed`, `Patterns` and `Record` exist."""

    @property
    def words(self) -> str:
        """The values it accepts, in words, for errors and pages."""

    def problems(self, value: Any, where: str) -> list[str]:
        """List what is wrong with plain data; `where` names the field."""

    def read(self, value: Any) -> Any:
        """The field's value from plain data without problems."""

    def shorten(self, value: Any) -> Any:
        """The shortest plain data that `read` turns into `value`."""

    def map_paths(self, value: Any, change: ChangePath) -> Any:
        """`value` with every path changed."""


@dataclass(frozen=True)
class Plain:
    """A value without paths in it."""

    words: str
    fits: Callable[[Any], bool]

    def problems(self, value: Any, where: str) -> list[str]:
        return [] if self.fits(value) else [f"{where} must be {self.words}, not {_brief(value)}"]

    def read(self, value: Any) -> Any:
        return value

    def shorten(self, value: Any) -> Any:
        return value

    def map_paths(self, value: Any, change: ChangePath) -> Any:
        return value


@dataclass(frozen=True)
class DottedPath(Plain):
    """The path of a module, a parameter or an attribute; or a number in its place, which has no path."""

    optional: bool = False
    """'' says that there is none. Otherwise '' is the block itself."""

    def map_paths(self, value: Any, change: ChangePath) -> Any:
        return change(value) if isinstance(value, str) and (value or not self.optional) else value


@dataclass(frozen=True)
class Listed:
    """Several values of one kind: a list in plain data, a tuple in the field."""

    words: str
    item: Kind
    least: int = 0

    def problems(self, value: Any, where: str) -> list[str]:
        wrong = [f"{where} must be {self.words}, not {_brief(value)}"]
        if not isinstance(value, list | tuple) or len(value) < self.least:
            return wrong
        found = [p for i, item in enumerate(value) for p in self.item.problems(item, f"{where}[{i}]")]
        return found if isinstance(self.item, Record) or not found else wrong

    def read(self, value: Any) -> Any:
        return tuple(map(self.item.read, value))

    def shorten(self, value: Any) -> Any:
        return [self.item.shorten(item) for item in value]

    def map_paths(self, value: Any, change: ChangePath) -> Any:
        return tuple(self.item.map_paths(item, change) for item in value)


@dataclass(frozen=True)
class Keyed(Plain):
    """A mapping from paths to something without paths."""

    def map_paths(self, value: Any, change: ChangePath) -> Any:
        return {change(path): what for path, what in value.items()}


@dataclass(frozen=True)
class Patterns:
    """A path, or several patterns: a list in plain data, a tuple in the field."""

    optional: bool = False
    words: str = "a path or a list of patterns"

    def problems(self, value: Any, where: str) -> list[str]:
        if isinstance(value, str):
            fits = bool(value) or self.optional
        else:
            fits = isinstance(value, list | tuple) and bool(value) and all(map(is_text, value))
        return [] if fits else [f"{where} must be {self.words}, not {_brief(value)}"]

    def read(self, value: Any) -> Any:
        return value if isinstance(value, str) else tuple(value)

    def shorten(self, value: Any) -> Any:
        return value if isinstance(value, str) else list(value)

    def map_paths(self, value: Any, change: ChangePath) -> Any:
        return change(value) if isinstance(value, str) else tuple(map(change, value))


@dataclass(frozen=True)
class Record:
    """A dataclass of this kind inside another one, or None where that is allowed."""

    cls: type
    short: str = ""
    """The field that a bare string sets."""
    optional: bool = False

    @property
    def words(self) -> str:
        return f"a path or {shape(self.cls)}" if self.short else shape(self.cls)

    def problems(self, value: Any, where: str) -> list[str]:
        if isinstance(value, dict):
            return problems(self.cls, value, f"{where}.")
        if (value is None and self.optional) or (self.short and isinstance(value, str) and value):
            return []
        return [f"{where} must be {self.words}, not {_brief(value)}"]

    def read(self, value: Any) -> Any:
        if isinstance(value, str):
            value = {self.short: value}
        return None if value is None else from_plain(self.cls, value)

    def shorten(self, value: Any) -> Any:
        short = None if value is None else shortened(value)
        return short[self.short] if short and list(short) == [self.short] else short

    def map_paths(self, value: Any, change: ChangePath) -> Any:
        return value if value is None else map_paths(value, change)


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80


def _brief(value: Any) -> str:
    """A value for an error: its beginning, if it is long."""
    return _REPR.repr(value)


def holds(kind: Kind, required: bool | None = None) -> dict[str, Any]:
    """The metadata of a field. `required`: plain data must have it; None: unless the field has a default."""
    return {"kind": kind, "required": required}


def kind_of(one: Field[Any]) -> Kind:
    """Return what a field holds."""
    kind: Kind = one.metadata["kind"]
    return kind


def is_required(one: Field[Any]) -> bool:
    """Return whether plain data must have the field."""
    required = one.metadata["required"]
    return not _has_default(one) if required is None else bool(required)


def described(cls: Any) -> Iterator[Field[Any]]:
    """The fields of a dataclass, or of an instance, that say what they hold."""
    return (one for one in fields(cls) if "kind" in one.metadata)


def shape(cls: type) -> str:
    """`{path, parts, by_unit}`: the fields of a record."""
    return "{" + ", ".join(one.name for one in described(cls)) + "}"


def problems(cls: type, data: Any, prefix: str = "") -> list[str]:
    """List what keeps plain data from being a `cls`: each field that is missing, unknown or of the wrong kind.

    `prefix` precedes the names of its fields: `sites[0].`.
    """
    if not isinstance(data, dict):
        return [f"{prefix.rstrip('.') or 'it'} must be a mapping, not {data!r}"]
    known = {one.name: one for one in described(cls)}
    found = [f"unknown field {prefix}{str(name)[:80]}" for name in data if name not in known]
    for name, one in known.items():
        if name in data:
            found += kind_of(one).problems(data[name], f"{prefix}{name}")
        elif is_required(one):
            found.append(f"{prefix}{name} is missing")
    return found


def from_plain(cls: type[Schema], data: Mapping[str, Any]) -> Schema:
    """A `cls` from plain data in which `problems` found none."""
    return cls(**{one.name: kind_of(one).read(data[one.name]) for one in described(cls) if one.name in data})


def shortened(data: Any) -> dict[str, Any]:
    """A dataclass as the shortest plain data that `from_plain` reads: required fields, and what is not the default."""
    return {
        one.name: kind_of(one).shorten(getattr(data, one.name))
        for one in described(data)
        if is_required(one) or not _has_default(one) or getattr(data, one.name) != _default(one)
    }


def map_paths(data: Schema, change: ChangePath) -> Schema:
    """A copy of a dataclass in which `change` has been applied to every path, those of nested records too."""
    changed = {o.name: kind_of(o).map_paths(getattr(data, o.name), change) for o in described(data)}
    return replace(data, **changed)  # type: ignore[type-var]


def _has_default(one: Field[Any]) -> bool:
    return one.default is not MISSING or one.default_factory is not MISSING


def _default(one: Field[Any]) -> Any:
    return one.default if one.default_factory is MISSING else one.default_factory()


# ---- the kinds that tables are made of ----


def is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def by_path(words: str, fits: Callable[[Any], bool]) -> Keyed:
    """A mapping from paths to values that fit."""
    return Keyed(
        words, lambda value: isinstance(value, dict) and all(is_text(k) and fits(v) for k, v in value.items())
    )


def one_of(names: tuple[str, ...]) -> Plain:
    """One of a few words."""
    return Plain(f"one of {', '.join(names)}", lambda value: value in names)


ANY_TEXT = Plain("text", lambda value: isinstance(value, str))
NAME = Plain("a name", is_text)
TRUTH = Plain("true or false", lambda value: isinstance(value, bool))
WHOLE = Plain("a whole number", lambda value: type(value) is int)
COUNT = Plain("a number above 0", is_count)
SIZE = Plain("a number of 0 or more", lambda value: type(value) is int and value >= 0)
ARGUMENT = Plain("an argument", is_text)
OPTIONAL_ARGUMENT = Plain("an argument", lambda value: isinstance(value, str))
PATH = DottedPath("a path", is_text)
ANY_PATH = DottedPath("a path", lambda value: isinstance(value, str))
"""'' is the block itself."""
OPTIONAL_PATH = DottedPath("a path", lambda value: isinstance(value, str), optional=True)
ATTRIBUTE = DottedPath("an attribute", is_text)
OPTIONAL_ATTRIBUTE = DottedPath("an attribute", lambda value: isinstance(value, str), optional=True)
PATHS = Listed("a list of paths", PATH)
