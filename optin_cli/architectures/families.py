"""The registry of families: tables that ship with optin, are registered, or are read from files.

A table is data. `register_family` adds one from Python, `read_family` reads one from a file, and a
pruned directory includes its table, so that it loads on a machine that never saw the registration.
See docs/anatomy.md for how to write one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from optin_cli.architectures.audio import AUDIOS
from optin_cli.architectures.bert import ENCODERS
from optin_cli.architectures.cnns import CNNS
from optin_cli.architectures.decoders import DECODERS
from optin_cli.architectures.schema import Family, SiteTable, StreamTable, TokenTable
from optin_cli.architectures.segmentation import SEGMENTATION
from optin_cli.architectures.swin import SWIN
from optin_cli.architectures.torchvision import TORCHVISION
from optin_cli.architectures.vit import TOWERS, VITS
from optin_cli.artefacts.kinds import load_yaml
from optin_cli.errors import UsageError
from optin_cli.structure.fields import from_plain, problems, shortened

__all__ = [
    "DOCS", "TOWERS", "Family", "SiteTable", "StreamTable", "TokenTable", "family_from_dict",
    "family_to_dict", "family_to_yaml", "find_family", "known_families", "read_family", "register_family",
]  # fmt: skip

DOCS = "docs/anatomy.md"
_PROBLEMS_SHOWN = 5

_REGISTRY: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Add an architecture, or replace one of the same name.

    Raises `UsageError` when another family already claims one of its `matches`.

    Example:
        >>> neurons = optin.SiteTable("neurons", producers=(optin.Producer("fc1"),), consumer="fc2")
        >>> optin.register_family(optin.Family("mixer", ("MyMixer",), "layers", (neurons,), modality="image"))
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
    """All registered families, by name.

    Example:
        >>> "bert" in [family.name for family in optin.known_families()]
        True
    """
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

    plain = json.loads(json.dumps(shortened(family)))  # no tuples
    text = yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=100, allow_unicode=True)
    return "".join(f"# {line}\n" for line in comments) + text


def family_from_dict(data: dict[str, Any], where: str = "family table") -> Family:
    """Read a family from plain data. A producer is a path or a mapping of its fields; `where` names the source in
    errors.

    Raises `UsageError` naming every field that is missing, unknown or of the wrong kind.
    """
    found = problems(Family, data)
    if not data.get("blocks") and not data.get("streams"):
        found.append("blocks is missing")
    if found:
        more = len(found) - _PROBLEMS_SHOWN
        listed = "; ".join(found[:_PROBLEMS_SHOWN]) + (f"; and {more} more" if more > 0 else "")
        raise UsageError(f"{where} is not a family table: {listed}", f"{DOCS} shows a complete table")
    return from_plain(Family, {"blocks": "", **data})


def read_family(path: str | Path) -> Family:
    """Read a family table from a YAML (or JSON) file, as `optin families --trace` proposes one.

    Raises `UsageError` for a file that can't be read or is not a table.

    Example:
        >>> table = "{name: m, matches: [M], blocks: layers, sites: [{kind: neurons, producers: [fc1], consumer: fc2}]}"
        >>> _ = (folder / "mixer.yaml").write_text(table)
        >>> optin.read_family(folder / "mixer.yaml").sites[0].consumer
        'fc2'
    """
    path = Path(path)
    try:
        data = load_yaml(path)
    except OSError as error:
        raise UsageError(f"can't read the anatomy file {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path} is not YAML: {error}", f"{DOCS} shows a complete table") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path} holds no table", f"{DOCS} shows a complete table")
    return family_from_dict(data, str(path))


for _family in (*VITS, *ENCODERS, *DECODERS, *SWIN, *CNNS, *TORCHVISION, *SEGMENTATION, *AUDIOS):
    register_family(_family)
