"""`export`: trace a model, write it for another runtime, run the file, compare it, and only then give it its name."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from optin_cli.architectures.families import family_to_dict
from optin_cli.artefacts import temporary
from optin_cli.artefacts.changes import Change, changes, explain, explain_new
from optin_cli.artefacts.exported import (
    FILE_NAME,
    ExportedFile,
    ExportRecord,
    read_export,
    record_beside,
    with_pruned,
    write_export,
)
from optin_cli.artefacts.files import atomic_dir, check_no_folder, check_space, check_writable
from optin_cli.artefacts.files import check_output as make_parent
from optin_cli.errors import OutputDiffers, UsageError, param
from optin_cli.loading.checkpoint import OpenModel, save_companions, save_config
from optin_cli.runtimes.cached import cache_shapes, expected_in_steps, stepwise, trace_cached
from optin_cli.runtimes.checks import Checks
from optin_cli.runtimes.program import Traced, trace
from optin_cli.runtimes.registry import BY_SUFFIX, TARGETS
from optin_cli.runtimes.settings import ONNX, ExportSettings
from optin_cli.runtimes.targets import (
    Runtime,
    Target,
    check_installed,
    packages_of,
    parts_of,
    runtime_name,
)
from optin_cli.runtimes.verify import agreement, deviation, expected

Progress = Callable[[float, float, str], None]
"""Called with (steps done, all steps, what is being done)."""
_STEPS = 4


@dataclass(frozen=True)
class Exported:
    """The result of `export`."""

    path: Path
    """The file."""
    facts: ExportedFile
    """What is known of it, as its record has it."""
    bytes: int
    """Size on disk, weights beside the file included."""
    reused: bool = False


def export(
    model: OpenModel,
    settings: ExportSettings,
    output: Path,
    open_checks: Callable[[OpenModel], Checks],
    *,
    force: bool = False,
    on_progress: Progress = lambda *_: None,
) -> Exported:
    """Write `model` for another runtime: a file, where `output` ends as files of that runtime do, or a directory.

    A directory has the layout that optimum and sentence-transformers look for, with what opens it again; further files
    of the same model are added to it. Raises `UsageError` for something else at `output`, `InputError` for a model that
    can't be exported, `OptinError` where the file deviates from the model.
    """
    target = target_of(settings)
    single = is_file(output, target)
    model = _plain(model)
    file = output if single else output / target.files[settings.precision]
    record = check_output(output, single, model, force)
    if record is not None and not force:
        facts = record.files.get(str(file.relative_to(file.parent if single else output)))
        if facts is not None and file.is_file():
            differing = changes({**facts, "cache": "cache" in facts}, _asked(facts, settings))
            explain(file, differing, ("model", *_asked(facts, settings)))
            if not differing:
                return Exported(file, facts, _bytes(file), reused=True)
            raise OutputDiffers(
                f"{file} exists, exported with other settings",
                f"choose another name, or {param('force', True)} to replace it",
            )
    check_space(output, 2 * sum(p.numel() * p.itemsize for p in model.module.parameters()))
    checks = open_checks(model)
    if settings.int8:
        checks.need_examples()
    keep = record is not None and record.model["digest"] == model.digest
    with _folder(output, single, keep) as folder:
        written = folder / (file.name if single else file.relative_to(output))
        written.parent.mkdir(parents=True, exist_ok=True)
        for part in (*parts_of(written), folder / FILE_NAME):
            part.unlink(missing_ok=True)  # it may be the file of the old folder
        facts = _write(model, settings, target, written, checks, on_progress)
        size = _bytes(written)
        if single:
            made = _new_record(model)
            made.files[file.name] = facts
            write_export(record_beside(written), made)
        else:
            made = record if record is not None and keep else _directory(folder, model)
            made.files[str(written.relative_to(folder))] = facts
            write_export(folder / FILE_NAME, made)
    return Exported(file, facts, size)


def target_of(settings: ExportSettings) -> Target:
    """The runtime. Raises `UsageError` for settings that can't go together, and for missing packages."""
    if settings.to not in TARGETS:
        raise UsageError(f"unknown runtime {settings.to!r}", f"use {', '.join(TARGETS)}")
    target = TARGETS[settings.to]
    if settings.fp16 and settings.int8:
        raise UsageError(f"{param('fp16')} and {param('int8')} are two precisions", "leave one of them out")
    if settings.precision not in target.files:
        able = ", ".join(name for name, one in TARGETS.items() if settings.precision in one.files)
        raise UsageError(
            f"{param('int8')} is for {able}", f"leave {param('int8')} out, or export to one of them"
        )
    if settings.opset is not None and settings.to != ONNX:
        raise UsageError(f"{param('opset')} is about ONNX", f"leave {param('opset')} out")
    if settings.cache and settings.to != ONNX:
        raise UsageError(f"{param('cache')} is for {ONNX}", f"leave {param('cache')} out")
    if settings.max_error < 0:
        raise UsageError(f"{param('max_error', settings.max_error)} is negative")
    check_installed(target, int8=settings.int8)
    return target


def is_file(output: Path, target: Target) -> bool:
    """Whether `output` is the name of a single file. Raises `UsageError` for a file of another runtime."""
    suffix = output.suffix.lower()
    if suffix == target.suffix:
        check_no_folder(output, f"file of {target.name}")
        return True
    if suffix in BY_SUFFIX:
        raise UsageError(
            f"{output} is a name for {BY_SUFFIX[suffix].name}, and {param('to')} says {target.name}",
            f"end it in {target.suffix}, or name a folder",
        )
    return False


def check_output(output: Path, single: bool, model: OpenModel, force: bool) -> ExportRecord | None:
    """The record of what was exported to `output` before. Raises `UsageError` for anything else that is there."""
    check_writable(output, "file" if single else "folder")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        explain_new(output)
        return None
    there = record_beside(output) if single else output / FILE_NAME
    if model.source.folder is not None and output.resolve() == model.source.folder.resolve():
        raise UsageError(
            f"{output} is the model being read", "choose another output: what others open needs other files"
        )
    if (not single and not output.is_dir()) or not there.is_file():
        raise UsageError(
            f"{output} exists and was not made by optin export",
            f"choose another output; {param('force', True)} replaces exported models only",
        )
    record = read_export(there)
    if record.model["digest"] != model.digest and not force:
        explain(output, [Change("model", record.model["digest"], model.digest)], ())
        raise OutputDiffers(
            f"{output} exists, exported from another model ({record.model['id']})",
            f"choose another name, or {param('force', True)} to replace it",
        )
    return record


def _asked(facts: ExportedFile, settings: ExportSettings) -> dict[str, Any]:
    """What a file is asked to be, of that which such a file records and which was asked for."""
    asked = {"precision": settings.precision, "max_error": settings.max_error, "opset": settings.opset}
    given = {name: value for name, value in asked.items() if name in facts and value is not None}
    return {**given, "cache": settings.cache}


def _write(
    model: OpenModel,
    settings: ExportSettings,
    target: Target,
    path: Path,
    checks: Checks,
    on_progress: Progress,
) -> ExportedFile:
    """Write a file, run it and compare it with the model; returns what is known of it."""
    on_progress(0, _STEPS, "tracing the model")
    cache = cache_shapes(model, checks.batches[0]) if settings.cache else {}
    traced = _traced(model, checks, cache)
    wanted = (  # before float16: that is what a file is compared with
        expected_in_steps(model, checks) if cache else expected(model, traced.module, checks)
    )
    facts: dict[str, Any] = {}
    if settings.fp16:
        half = replace(model, module=copy.deepcopy(model.module).to(torch.float16))
        traced = _traced(half, checks, cache)
    on_progress(1, _STEPS, f"converting it to {target.name}")
    if settings.int8:
        facts = target.write_int8(model, traced, path, checks, settings.max_error, settings.opset)
    else:
        facts = target.write(traced, path, settings.opset)
    on_progress(2, _STEPS, "comparing the file with the model")
    runtime = Runtime(
        runtime_name(target), path, settings.precision, tuple(traced.file_inputs), tuple(traced.outputs),
        target.load(path, traced.outputs), cache,
    )  # fmt: skip
    session = stepwise(runtime.session, cache) if cache else runtime.session
    found = deviation(session, wanted, checks, settings.precision)
    made: ExportedFile = {
        "to": target.name,
        "precision": settings.precision,
        "inputs": traced.file_inputs,
        "outputs": traced.outputs,
        "deviation": found.largest,
        "checked_on": checks.where,
        "shapes": checks.shapes,
        "versions": {name: version(name) for name in ("torch", *packages_of(target, int8=settings.int8))},
    }
    if cache:
        made["cache"] = cache
    if found.tolerance is not None:
        made["tolerance"] = found.tolerance
    if settings.int8:
        on_progress(3, _STEPS, "measuring int8 against float32")
        made |= {"agreement": agreement(model, runtime, checks), "examples": checks.count}
        made["max_error"] = settings.max_error
    on_progress(_STEPS, _STEPS, "done")
    return made | facts  # type: ignore[return-value]


def _plain(model: OpenModel) -> OpenModel:
    """The model in float32 on the CPU: a trace notes where its tensors are."""
    if model.device.type == "cpu" and model.dtype == torch.float32:
        return model
    return replace(model, module=copy.deepcopy(model.module).to("cpu", torch.float32))


def _traced(model: OpenModel, checks: Checks, cache: Mapping[str, Sequence[int]]) -> Traced:
    return trace_cached(model, checks.batches[0], cache) if cache else trace(model, checks.batches[0])


def _new_record(model: OpenModel) -> ExportRecord:
    made = {"id": model.spec, "digest": model.digest, "task": model.task.name, "dense": model.dense["id"]}
    if model.source.folder is not None and not model.source.in_memory:
        made["id"] = _id(model)
    return ExportRecord(made, family_to_dict(model.family))  # type: ignore[arg-type]


def _id(model: OpenModel) -> str:
    """The name of a model by which it opens from anywhere."""
    folder = Path(model.spec).expanduser()
    return str(folder.resolve()) if folder.is_dir() else model.spec


def _directory(folder: Path, model: OpenModel) -> ExportRecord:
    """Write what opens a directory of exported files: config, tokenizer and so on; returns its record."""
    save_config(folder, model)
    save_companions(folder, model)
    return with_pruned(_new_record(model), model.record)


@contextmanager
def _folder(output: Path, single: bool, keep: bool) -> Iterator[Path]:
    """A temporary folder. What is in it takes its place at the end: as the folder `output`, which may `keep` what it
    has, or file by file."""
    if not single:
        with atomic_dir(output) as folder:
            if keep:
                shutil.copytree(output, folder, dirs_exist_ok=True, copy_function=_link)
            yield folder
        return
    make_parent(output, "file")
    with temporary.made(output, folder=True) as folder:
        yield folder
        made = sorted(folder.iterdir(), key=lambda path: path.name == output.name)
        for path in made:  # the file itself last
            path.replace(output.with_name(path.name))


def _link(source: str, target: str) -> None:
    """Files that stay are not changed, so that two folders may share one."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _bytes(path: Path) -> int:
    return sum(part.stat().st_size for part in parts_of(path))
