"""`optin-export.json`: which model exported files are of, how they were made and how near they are to it.

In a directory of exported files it names each of them; beside a single file it is that file's name with `.json`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from optin_cli.artefacts.files import read_record, to_json
from optin_cli.artefacts.pruned import PrunedRecord, parse_pruned, pruned_json
from optin_cli.errors import ArtefactError

FORMAT = "optin-exported-model"
SCHEMA_VERSION = 1
FILE_NAME = "optin-export.json"
_DEPTH = 2  # a directory's files are in a folder of it


class ExportedFile(TypedDict):
    """One file: what runs it, and its comparison with the model in torch."""

    to: str
    """The runtime: `onnx`, `openvino` or `torch`."""
    precision: str
    """`float32`, `float16` or `int8`."""
    inputs: list[str]
    outputs: list[str]
    deviation: float
    """Largest absolute difference from the outputs of the model in torch."""
    checked_on: str
    """The data of both batches, or `noise`."""
    shapes: list[list[int]]
    """Of the first input in both batches."""
    versions: dict[str, str]
    opset: NotRequired[int]
    tolerance: NotRequired[float]
    """The largest deviation that would have passed; int8 has none."""
    cache: NotRequired[dict[str, list[int]]]
    """Of a decoder with its cache: input of past keys or values -> (heads, width)."""
    agreement: NotRequired[dict[str, float]]
    """Of int8: fidelity to the model in torch, as `optin eval` measures it."""
    examples: NotRequired[int]
    """That the agreement is of, of the data in `checked_on`."""
    max_error: NotRequired[float]
    error: NotRequired[float]
    """Of int8 in OpenVINO: by how much outputs moved on the examples it was calibrated on, as `max_error` counts."""
    layer_errors: NotRequired[dict[str, float]]
    """Of int8 in ONNX: layer -> squared error of the outputs where it alone is int8, relative to their spread."""
    float_layers: NotRequired[list[str]]
    """Of int8: layers that stay in float32."""
    weight_bits: NotRequired[int]


class ExportedFrom(TypedDict):
    """The model that was exported."""

    id: str
    digest: str
    task: str
    dense: str
    """The id of the dense original."""


@dataclass
class ExportRecord:
    """The files that were exported from one model."""

    model: ExportedFrom
    family: dict[str, Any]
    """The table of the architecture, so that opening needs no registration."""
    pruned: dict[str, Any] | None = None
    """What `optin.json` holds of a pruned model, in a directory."""
    files: dict[str, ExportedFile] = field(default_factory=dict)
    """Path from the record's folder -> what is known of the file."""


def write_export(path: Path, record: ExportRecord) -> None:
    path.write_text(to_json({"format": FORMAT, "schema_version": SCHEMA_VERSION, **asdict(record)}) + "\n")


def read_export(path: Path) -> ExportRecord:
    """Read a record. Raises `UsageError` for a path that can't be read, `ArtefactError` when it is damaged."""
    record = read_record(
        path, ExportRecord, "the record of exported files", FORMAT, SCHEMA_VERSION, maker="optin export"
    )
    if outside := [name for name in record.files if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise ArtefactError(
            f"{path} is a damaged record: it names {outside[0]}, which is outside of its folder",
            "run `optin export` again",
        )
    return record


def with_pruned(record: ExportRecord, pruned: PrunedRecord | None) -> ExportRecord:
    """Note what `optin.json` holds of the model that is exported."""
    return record if pruned is None else replace(record, pruned=json.loads(pruned_json(pruned)))


def pruned_of(record: ExportRecord, where: Path) -> PrunedRecord | None:
    """The record of the pruned model that was exported. Raises `ArtefactError` when it is damaged."""
    return None if record.pruned is None else parse_pruned(json.dumps(record.pruned), str(where))


def record_beside(path: Path) -> Path:
    """The record of a single exported file."""
    return path.with_name(f"{path.name}.json")


def record_of(path: Path) -> tuple[str, ExportRecord, Path] | None:
    """Find the record that names an exported file: (its name in the record, record, where that is).

    A directory's record comes first. None where no record names the file. Raises `ArtefactError` for a damaged one.
    """
    for folder in path.resolve().parents[:_DEPTH]:
        name, there = str(path.resolve().relative_to(folder)), folder / FILE_NAME
        if there.is_file() and name in (record := read_export(there)).files:
            return name, record, there
    there = record_beside(path)
    if there.is_file() and path.name in (record := read_export(there)).files:
        return path.name, record, there
    return None
