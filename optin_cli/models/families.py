"""Which families are known: the shipped tables, those registered, and those read from files.

A table is data. `register_family` adds one from Python, `--anatomy FILE.yaml` from the command line, and a
pruned directory carries its own, so that it loads on a machine that never saw the registration.
See docs/anatomy.md for how to write one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from optin_cli.errors import UsageError
from optin_cli.models.anatomy import (
    CHANNELS,
    HEADS,
    LAYOUTS,
    MODALITIES,
    NEURONS,
    Bypass,
    Producer,
    RelativePositions,
    UnitInput,
)
from optin_cli.models.audio_tables import AUDIOS
from optin_cli.models.cnn_tables import CNNS
from optin_cli.models.decoder_tables import DECODERS
from optin_cli.models.encoder_tables import ENCODERS
from optin_cli.models.segmentation_tables import SEGMENTATION
from optin_cli.models.swin_tables import SWIN
from optin_cli.models.tables import (
    SHIPPED,
    TOWERS,
    Family,
    SiteTable,
    StreamTable,
    TokenTable,
)
from optin_cli.models.torchvision_tables import TORCHVISION

__all__ = [
    "DOCS",
    "TOWERS",
    "Family",
    "SiteTable",
    "StreamTable",
    "TokenTable",
    "family_from_dict",
    "family_to_dict",
    "family_to_yaml",
    "find_family",
    "known_families",
    "read_family",
    "register_family",
]

DOCS = "docs/anatomy.md"
_PROBLEMS_TOLD = 5

_REGISTRY: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Add an architecture, or replace one of the same name.

    Raises `UsageError` when another family already claims one of its `matches`.
    """
    for other in _REGISTRY.values():
        clash = set(other.matches) & set(family.matches)
        if other.name != family.name and clash:
            raise UsageError(
                f"family {family.name!r} claims {', '.join(sorted(clash))}, which {other.name!r} has already",
                f"register it under the name {other.name!r} to replace that table",
            )
    _REGISTRY[family.name] = family


def known_families() -> list[Family]:
    """All registered families, by name."""
    return sorted(_REGISTRY.values(), key=lambda family: family.name)


def find_family(candidates: list[str]) -> Family | None:
    """The family that matches one of `candidates` (a model type, class names), or None."""
    return next(
        (family for key in candidates for family in _REGISTRY.values() if key in family.matches), None
    )


def family_to_dict(family: Family) -> dict[str, Any]:
    """A family as plain JSON or YAML data; `family_from_dict` reads it back."""
    return asdict(family)


def family_to_yaml(family: Family, comments: Sequence[str] = ()) -> str:
    """A family as `read_family` reads it: only what differs from the defaults, after lines of `comments`."""
    import yaml

    table = _differing(family)
    for site, short in zip(family.sites, table["sites"], strict=True):
        short["consumer"] = site.consumer
        short["producers"] = [p.path if p == Producer(p.path) else _differing(p) for p in site.producers]
    plain = json.loads(json.dumps(table))  # no tuples
    text = yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=100, allow_unicode=True)
    return "".join(f"# {line}\n" for line in comments) + text


def _differing(data: Any) -> Any:
    """The same as plain data: of a dataclass the fields that are not at their defaults."""
    if isinstance(data, list | tuple):
        return [_differing(item) for item in data]
    if not is_dataclass(data):
        return data
    short = {}
    for field in fields(data):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if (value := getattr(data, field.name)) != default:
            short[field.name] = _differing(value)
    return short


def family_from_dict(data: dict[str, Any], where: str = "family table") -> Family:
    """Read a family from plain data. A producer is a path or a mapping of its fields; `where` names the source in
    errors.

    Raises `UsageError` naming every field that is missing, unknown or of the wrong kind.
    """
    problems = _mistyped(data, _FAMILY_FIELDS, "")
    for number, site in enumerate(data["sites"] if isinstance(data.get("sites"), list | tuple) else ()):
        problems += _mistyped(site, _SITE_FIELDS, f"sites[{number}].")
    for number, stream in enumerate(data["streams"] if isinstance(data.get("streams"), list | tuple) else ()):
        problems += _mistyped(stream, _STREAM_FIELDS, f"streams[{number}].")
    if not data.get("blocks") and not data.get("streams"):
        problems.append("blocks is missing")
    if data.get("tokens") is not None:
        problems += _mistyped(data["tokens"], _TOKEN_FIELDS, "tokens.")
    if problems:
        more = len(problems) - _PROBLEMS_TOLD
        told = "; ".join(problems[:_PROBLEMS_TOLD]) + (f"; and {more} more" if more > 0 else "")
        raise UsageError(f"{where} is not a family table: {told}", f"{DOCS} shows a complete table")
    sites = tuple(
        SiteTable(
            **{
                **site,
                "producers": tuple(
                    Producer(**p) if isinstance(p, dict) else Producer(p) for p in site["producers"]
                ),
                "unit_inputs": tuple(UnitInput(**u) for u in site.get("unit_inputs", ())),
                "relative": RelativePositions(**site["relative"]) if site.get("relative") else None,
                "bypass": Bypass(**site["bypass"]) if site.get("bypass") else None,
                **{
                    field: tuple(site.get(field, ()))
                    for field in ("carried", "readers", "must_be_identity", "requires")
                },
            }
        )
        for site in data["sites"]
    )
    streams = tuple(
        StreamTable(**{**stream, "blocks": _patterns(stream["blocks"])}) for stream in data.get("streams", ())
    )
    tokens = data.get("tokens")
    if tokens is not None:
        tokens = TokenTable(**{**tokens, "prefix": tuple(tokens.get("prefix", ()))})
    return Family(
        **{
            **data,
            "matches": tuple(data["matches"]),
            "blocks": _patterns(data.get("blocks", "")),
            "sites": sites,
            "tokens": tokens,
            "streams": streams,
        }
    )


def _patterns(blocks: str | Sequence[str]) -> str | tuple[str, ...]:
    return blocks if isinstance(blocks, str) else tuple(blocks)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


def _list_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(check(item) for item in value)


def _is_blocks(value: Any) -> bool:
    return _is_text(value) or (bool(value) and _list_of(_is_text)(value))


def _is_producer(value: Any) -> bool:
    if isinstance(value, dict):
        return (
            set(value) <= {"path", "parts", "by_unit", "shared", "per_batch", "width"}
            and _is_text(value.get("path"))
            and _is_count(value.get("parts", 1))
            and all(isinstance(value.get(name, False), bool) for name in ("by_unit", "shared", "per_batch"))
            and _is_size(value.get("width", 0))
        )
    return _is_text(value)


def _is_unit_input(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and {"module", "argument", "axis"} <= set(value)
        and set(value) <= {"module", "argument", "axis", "returned", "maker", "needs"}
        and _is_text(value["module"])
        and _is_text(value["argument"])
        and all(type(value.get(name, 0)) is int for name in ("axis", "returned"))
        and all(isinstance(value.get(name, ""), str) for name in ("maker", "needs"))
    )


def _is_counts(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _is_text(k) and v in ("units", "features") for k, v in value.items()
    )


def _is_axes(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_text(k) and type(v) is int for k, v in value.items())


def _is_bypass(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) <= {"module", "in_tuple", "cache", "attended", "empty"}
        and _is_text(value.get("module"))
        and isinstance(value.get("in_tuple", 0), int)
        and all(isinstance(value.get(name, ""), str) for name in ("cache", "attended"))
        and isinstance(value.get("empty", False), bool)
    )


def _is_relative(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) <= {"kinds", "rows"}
        and _is_text(value.get("kinds"))
        and isinstance(value.get("rows", ""), str)
    )


# field -> (required, what it must be, check)
_Fields = dict[str, tuple[bool, str, Callable[[Any], bool]]]
_FAMILY_FIELDS: _Fields = {
    "name": (True, "a name", _is_text),
    "matches": (True, "a list of names", _list_of(_is_text)),
    "blocks": (False, "a path or a list of patterns", lambda v: isinstance(v, str) or _is_blocks(v)),
    "sites": (True, "a list of sites", lambda v: _list_of(lambda s: isinstance(s, dict))(v) and bool(v)),
    "modality": (False, f"one of {', '.join(MODALITIES)}", lambda v: v in MODALITIES),
    "note": (False, "text", lambda v: isinstance(v, str)),
    "layout": (False, f"one of {', '.join(LAYOUTS)}", lambda v: v in LAYOUTS),
    "hierarchical": (False, "true or false", lambda v: isinstance(v, bool)),
    "repeats": (False, "an attribute of the config", lambda v: isinstance(v, str)),
    "thresholds": (False, "true or false", lambda v: isinstance(v, bool)),
    "arguments": (False, "argument: value", lambda v: isinstance(v, dict) and all(map(_is_text, v))),
    "streams": (False, "a list of streams", _list_of(lambda s: isinstance(s, dict))),
    "chained": (False, "true or false", lambda v: isinstance(v, bool)),
    "tokens": (False, "{keys, attention, bias, prefix, part}", lambda v: v is None or isinstance(v, dict)),
}
_STREAM_FIELDS: _Fields = {
    "blocks": (True, "a path or a list of patterns", _is_blocks),
    "layout": (False, f"one of {', '.join(LAYOUTS)}", lambda v: v in LAYOUTS),
    "mask": (False, "the name of an input", _is_text),
}
_TOKEN_FIELDS: _Fields = {
    "keys": (True, "a path", _is_text),
    "attention": (True, "a path", _is_text),
    "bias": (True, "an argument", _is_text),
    "prefix": (False, "a list of attributes", _list_of(_is_text)),
    "part": (False, "a number of 0 or more", lambda v: type(v) is int and v >= 0),
}
_SITE_FIELDS: _Fields = {
    "kind": (True, f"{HEADS}, {NEURONS} or {CHANNELS}", lambda v: v in (HEADS, NEURONS, CHANNELS)),
    "name": (False, "a word without dots", lambda v: isinstance(v, str) and "." not in v),
    "producers": (True, "a list of paths or {path, parts, by_unit, shared, width}", _list_of(_is_producer)),
    "consumer": (True, "a path", lambda v: isinstance(v, str)),
    "carried": (False, "a list of paths", _list_of(_is_text)),
    "readers": (False, "a list of paths", _list_of(_is_text)),
    "masked_at": (False, "a path", lambda v: isinstance(v, str)),
    "norm": (False, "a path", lambda v: isinstance(v, str)),
    "unit_width": (False, "a number above 0 or an attribute", lambda v: _is_text(v) or _is_count(v)),
    "unit_count": (False, "an attribute", lambda v: isinstance(v, str)),
    "group": (False, "an attribute", lambda v: isinstance(v, str)),
    "counts": (False, "attribute: units or features", _is_counts),
    "unit_inputs": (False, "a list of {module, argument, axis}", _list_of(_is_unit_input)),
    "tensors": (False, "path: axis", _is_axes),
    "relative": (False, "{kinds, rows}", lambda v: v is None or _is_relative(v)),
    "batch_axis": (False, "0 or more", lambda v: type(v) is int and v >= 0),
    "bypass": (False, "{module, in_tuple, cache, attended, empty}", lambda v: v is None or _is_bypass(v)),
    "pairs": (False, "true or false", lambda v: isinstance(v, bool)),
    "must_be_identity": (False, "a list of paths", _list_of(_is_text)),
    "requires": (False, "a list of paths", _list_of(_is_text)),
}


def _mistyped(data: Any, known: _Fields, prefix: str) -> list[str]:
    if not isinstance(data, dict):
        return [f"{prefix or 'it'} is no mapping"]
    problems = [f"unknown field {prefix}{name}" for name in data if name not in known]
    for name, (required, kind, check) in known.items():
        if name not in data:
            problems += [f"{prefix}{name} is missing"] if required else []
        elif not check(data[name]):
            problems.append(f"{prefix}{name} must be {kind}, not {data[name]!r}")
    return problems


def read_family(path: Path) -> Family:
    """Read a family table from a YAML (or JSON) file."""
    import yaml

    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UsageError(f"can't read the anatomy file {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {error}", f"{DOCS} shows a complete table") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path} holds no table", f"{DOCS} shows a complete table")
    return family_from_dict(data, str(path))


for _family in (*SHIPPED, *ENCODERS, *DECODERS, *SWIN, *CNNS, *TORCHVISION, *SEGMENTATION, *AUDIOS):
    register_family(_family)
