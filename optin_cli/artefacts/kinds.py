"""What a file is, as far as its first bytes say, and JSON and YAML that somebody else wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from optin_cli.errors import ArtefactError, UsageError

HDF5 = b"\x89HDF\r\n\x1a\n"
SEAL = b"optin ranking: HDF5 from byte 512 on; sha256 of that: "
"""Begins a ranking: HDF5 leaves room in front of itself for whoever wants to say what a file is."""
MOST_JSON = 64 * 2**20
"""Bytes of the largest JSON file that is read: a mask of five million units has less."""
MOST_YAML, _MOST_ITEMS = 2**20, 100_000
"""Bytes and items of the largest YAML file that is read."""
_LOOKED_AT = 4096
_BEGINNINGS = {
    HDF5: "an HDF5 file",
    b"PK\x03\x04": "a zip archive (perhaps weights that torch saved)",
    b"\x1f\x8b": "a gzip archive",
    b"\x80": "a pickle",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"GGUF": "a GGUF model",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"%PDF": "a PDF document",
    b"\x7fELF": "a program",
}


def load_json(path: Path) -> Any:
    """Read a JSON file that may hold anything.

    Raises `OSError`, or `ValueError` where it is no JSON in UTF-8, larger than `MOST_JSON`, nested too deeply, or holds
    numbers of thousands of digits: Python's parser has an exception of its own for each.
    """
    with path.open("rb") as stream:
        content = stream.read(MOST_JSON + 1)
    if len(content) > MOST_JSON:
        raise ValueError(f"it is larger than {MOST_JSON >> 20} MiB")
    return parse_json(content)


def parse_json(content: str | bytes) -> Any:
    """The same for JSON that is in memory."""
    try:
        return json.loads(content if isinstance(content, str) else content.decode())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not text in UTF-8 ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError:
        raise
    except ValueError:
        raise ValueError("a number in it has too many digits") from None


def load_yaml(path: Path) -> Any:
    """Read a small YAML file that may hold anything: plain data alone, whatever its tags say.

    Raises `OSError`, or `ValueError` where it is no YAML, too large, nested too deeply, or its aliases unfold to more
    than `_MOST_ITEMS`: nine lines can stand for 10^8.
    """
    with path.open("rb") as stream:
        content = stream.read(MOST_YAML + 1)
    if len(content) > MOST_YAML:
        raise ValueError(f"it is larger than {MOST_YAML >> 10} KiB")
    try:
        return parse_yaml(content.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not text in UTF-8 ({error.reason} at byte {error.start})") from None


def parse_yaml(text: str) -> Any:
    """The same of a text. Raises `ValueError`."""
    import yaml

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None and _unfolded(root, {}) > _MOST_ITEMS:
            raise ValueError("its aliases unfold to more than any table holds")
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _unfolded(node: Any, seen: dict[int, float]) -> float:
    """Items below a node of a YAML document with every alias written out; infinite for one that holds itself."""
    if id(node) not in seen:
        seen[id(node)] = float("inf")  # until it is known
        inner = node.value if isinstance(node.value, list) else []
        parts = [part for item in inner for part in (item if isinstance(item, tuple) else (item,))]
        seen[id(node)] = 1 + sum(_unfolded(part, seen) for part in parts)
    return seen[id(node)]


def stated_kind(path: Path) -> str | None:
    """`ranking`, `mask`, `latency table`: which artefact a file says it is; None where it does not say."""
    try:
        with path.open("rb") as stream:
            if stream.read(len(SEAL)).startswith((HDF5[:4], SEAL)):
                return "ranking"
        marker = load_json(path)["format"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    known = isinstance(marker, str) and marker.startswith("optin-")
    return marker.removeprefix("optin-").replace("-", " ") if known else None


def description(path: Path) -> str:
    """`a PNG image`, `a text file`: what a file is that is none of optin's, for errors."""
    with path.open("rb") as stream:
        start = stream.read(_LOOKED_AT)
    if not start:
        return "an empty file"
    if not start.strip(b"\0"):
        return "a file of zeros (as a disk leaves it that lost a block)"
    if found := next((kind for first, kind in _BEGINNINGS.items() if start.startswith(first)), None):
        return found
    if start[8:10] in (b'{"', b"{}"):
        return "a safetensors file"
    try:
        text = start.decode()
    except UnicodeDecodeError as error:
        if error.start < len(start) - 4:  # else a character is cut in two
            return "a binary file"
        text = start[: error.start].decode()
    if "\0" in text:
        return "a binary file"
    return "a JSON file" if text.lstrip().startswith(("{", "[")) else "a text file"


def check_kind(path: Path, kind: str, way_out: str) -> None:
    """Raise `UsageError` unless a file is at `path`, `ArtefactError` when it says that it is an artefact of another
    kind."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder, not a {kind}", way_out)
    if not path.is_file():
        raise UsageError(f"no {kind} at {path}", way_out)
    if (found := stated_kind(path)) not in (None, kind):
        raise ArtefactError(f"{path} is a {found}, not a {kind}", way_out)
