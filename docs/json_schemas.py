"""Write a JSON schema for what each command prints with `--json` into schemas/: `python docs/json_schemas.py`.

They are made from the types in optin_cli/commands/outputs.py and inspect_outputs.py. tests/commands/test_json.py holds
real outputs to them.
"""

from __future__ import annotations

import ast
import inspect
import json
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import dedent
from typing import Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

from optin_cli.commands.inspect_outputs import OUTPUTS
from optin_cli.console import JSON_SCHEMA_VERSION

FOLDER = Path(__file__).parent / "schemas"
DIALECT = "https://json-schema.org/draft/2020-12/schema"
OPEN = {"Asked", "Reached"}
"""Kinds of budgets that are registered add entries to these."""
_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def schema(command: str) -> dict[str, Any]:
    """The schema of a command's output: one of its kinds, each with the version."""
    found: dict[str, Any] = {}
    kinds = [_named(kind, found) for kind in OUTPUTS[command]]
    version = {
        "properties": {"schema_version": {"const": JSON_SCHEMA_VERSION}},
        "required": ["schema_version"],
    }
    return {
        "$schema": DIALECT,
        "title": f"optin {command} --json",
        "description": "Further keys may come within a schema_version; readers ignore them.",
        **version,
        **(kinds[0] if len(kinds) == 1 else {"anyOf": kinds}),
        "$defs": dict(sorted(found.items())),
    }


def described(hint: Any, found: dict[str, Any]) -> dict[str, Any]:
    """The schema of values of a type; those of named types are added to `found`."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return {}
    if hint in _PLAIN:
        return {"type": _PLAIN[hint]}
    if is_typeddict(hint):
        return _named(hint, found)
    if origin is Literal:
        return {"enum": list(inner)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [described(one, found) for one in inner]}
    if origin is NotRequired:
        return described(inner[0], found)
    if origin in (list, Sequence):
        return {"type": "array", "items": described(inner[0], found)}
    if origin in (dict, Mapping):
        return {"type": "object", "additionalProperties": described(inner[1], found)}
    raise TypeError(f"{hint} has no schema")


def _named(record: type, found: dict[str, Any]) -> dict[str, Any]:
    """A reference to the schema of a record."""
    if record.__name__ not in found:
        found[record.__name__] = {}  # a record may hold itself
        hints, meaning = get_type_hints(record, include_extras=True), docstrings(record)
        fields = {}
        for name, hint in hints.items():
            fields[name] = described(hint, found)
            if name in meaning:
                fields[name] = {**fields[name], "description": meaning[name]}
        made = {"type": "object", "description": " ".join((record.__doc__ or "").split())}
        made |= {
            "properties": fields,
            "required": [n for n in hints if get_origin(hints[n]) is not NotRequired],
        }
        if not made["description"]:
            del made["description"]
        found[record.__name__] = made
    return {"$ref": f"#/$defs/{record.__name__}"}


def docstrings(record: type) -> dict[str, str]:
    """Field -> the docstring below it, also of the records that it extends."""
    found: dict[str, str] = {}
    for one in (*getattr(record, "__orig_bases__", ()), record):
        if not is_typeddict(one) or one.__name__ == "ModelFacts":  # ModelFacts is made by a call
            continue
        if one is not record:
            found |= docstrings(one)
            continue
        body = ast.parse(dedent(inspect.getsource(one))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[ast.unparse(field.target)] = " ".join(ast.literal_eval(text.value).split())
    return found


def text(command: str) -> str:
    return json.dumps(schema(command), indent=2) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in OUTPUTS:
        (FOLDER / f"{name}.json").write_text(text(name))
