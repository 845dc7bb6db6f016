"""Plain data that was read from a file, checked against the types that are written down for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

_WORDS = {
    str: "text", int: "a whole number", float: "a number", bool: "true or false", NoneType: "null",
    dict: "a dict", list: "a list",
}  # fmt: skip
_MOST = 5
"""Problems that are listed: a file of another kind has thousands."""


def problems(value: Any, hint: Any, where: str, *, complete: bool = True) -> list[str]:
    """List the first few ways in which plain data is not of a type: `budget.tokens is missing`.

    The type is made of `TypedDict`s, lists, dicts, unions and plain values. Entries that it does not know are passed
    over, as are those that are missing, unless the data is to be `complete`.
    """
    found = _problems(value, hint, where, complete)
    return [problem for problem, _ in zip(found, range(_MOST), strict=False)]


def _problems(value: Any, hint: Any, where: str, complete: bool) -> Iterator[str]:
    origin = get_origin(hint) or hint
    if hint is Any or origin is object:
        return
    if origin is NotRequired:
        yield from _problems(value, get_args(hint)[0], where, complete)
    elif origin in (Union, UnionType):
        yield from _of_union(value, get_args(hint), where, complete)
    elif is_typeddict(origin):
        yield from _of_record(value, origin, where, complete)
    elif origin in (dict, Mapping):
        yield from _of_dict(value, get_args(hint), where, complete)
    elif origin in (list, tuple, Sequence):
        yield from _of_list(value, get_args(hint), where, complete)
    elif not _is_plain(value, origin):
        yield f"{where} must be {_WORDS.get(origin, origin)}"


def _is_plain(value: Any, kind: type) -> bool:
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind


def _of_union(value: Any, hints: Sequence[Any], where: str, complete: bool) -> Iterator[str]:
    """The problems with the alternative that comes nearest: that of the value's own kind."""
    if value is None and NoneType in hints:
        return
    each = [list(_problems(value, hint, where, complete)) for hint in hints if hint is not NoneType]
    if all(each):
        yield from max(each, key=len)


def _of_record(value: Any, record: Any, where: str, complete: bool) -> Iterator[str]:
    if type(value) is not dict:
        yield f"{where} must be a dict"
        return
    for name, hint in get_type_hints(record, include_extras=True).items():
        if name in value:
            yield from _problems(value[name], hint, f"{where}.{name}", complete)
        elif complete and get_origin(hint) is not NotRequired:
            yield f"{where}.{name} is missing"


def _of_dict(value: Any, hints: Sequence[Any], where: str, complete: bool) -> Iterator[str]:
    if type(value) is not dict:
        yield f"{where} must be a dict"
    elif hints:
        for name, item in value.items():
            yield from _problems(item, hints[1], f"{where}.{name}", complete)


def _of_list(value: Any, hints: Sequence[Any], where: str, complete: bool) -> Iterator[str]:
    if type(value) is not list:
        yield f"{where} must be a list"
    elif hints:
        for index, item in enumerate(value):
            yield from _problems(item, hints[0], f"{where}[{index}]", complete)
