"""Open exported files: as the model that they are of, run by their runtime."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from optin_cli.architectures.families import family_from_dict
from optin_cli.artefacts.exported import FILE_NAME, ExportRecord, pruned_of, read_export, record_of
from optin_cli.errors import ArtefactError, UsageError, param
from optin_cli.loading.checkpoint import OpenModel, open_model
from optin_cli.runtimes.registry import BY_SUFFIX, TARGETS
from optin_cli.runtimes.targets import Runtime, check_installed, runtime_name


def is_exported(spec: str) -> bool:
    """Whether MODEL is an exported file, or a directory of them."""
    path = Path(spec).expanduser()
    return (path.suffix.lower() in BY_SUFFIX and path.is_file()) or (path / FILE_NAME).is_file()


def open_exported(spec: str, *, device: str = "auto", trust_remote_code: bool = False) -> OpenModel:
    """Open an exported file, or the one in a directory: its outputs are the runtime's, on the CPU.

    Of a directory the model in torch is built without weights: it says what a forward costs, and what data it reads. Of
    a single file it is opened by the name in the file's record. Raises `UsageError` for a file that optin did not
    export, `ArtefactError` for one whose model has changed.
    """
    if device not in ("auto", "cpu"):
        raise UsageError(
            f"{spec} is an exported file, which is measured on a CPU", f"leave {param('device', device)} out"
        )
    file, record, folder = _located(Path(spec).expanduser())
    facts = record.files[str(file.relative_to(folder or file.parent))]
    if folder is not None:
        pruned = pruned_of(record, folder / FILE_NAME)
        model = _opened(str(folder), record, trust_remote_code, weights=False, pruned=pruned)
    else:
        model = _opened(record.model["id"], record, trust_remote_code)
        if model.digest != record.model["digest"]:
            raise ArtefactError(
                f"{file} was exported from other weights than {record.model['id']} has", "export it again"
            )
    target = TARGETS[facts["to"]]
    check_installed(target)
    runtime = Runtime(
        runtime_name(target), file, facts["precision"], tuple(facts["inputs"]), tuple(facts["outputs"]),
        target.load(file, facts["outputs"]), facts.get("cache", {}),
    )  # fmt: skip
    return replace(model, runtime=runtime, source=replace(model.source, spec=spec))


def _opened(spec: str, record: ExportRecord, trust_remote_code: bool, **options: Any) -> OpenModel:
    return open_model(
        spec, task=record.model["task"], device="cpu", dtype="float32",
        family=family_from_dict(record.family, "the record of exported files"),
        trust_remote_code=trust_remote_code, **options,
    )  # fmt: skip


def _located(path: Path) -> tuple[Path, ExportRecord, Path | None]:
    """(file, record, its directory; None for a single file)."""
    if path.is_dir():
        record = read_export(path / FILE_NAME)
        files = [name for name in record.files if (path / name).is_file()]
        if len(files) != 1:
            raise UsageError(
                f"{path} holds {len(files)} exported files",
                f"give one of them: {', '.join(str(path / name) for name in files)}"
                if files
                else "export again",
            )
        return path / files[0], record, path
    if (found := record_of(path)) is not None:
        name, record, there = found
        return there.parent / name, record, there.parent if there.name == FILE_NAME else None
    raise UsageError(
        f"{path} has no record beside it that says which model it is of",
        "`optin export` writes one: export the model with it",
    )
