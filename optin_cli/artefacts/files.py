"""Digests, JSON, and writes that leave either the whole file or nothing under its final name."""

from __future__ import annotations

import difflib
import errno
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

from optin_cli.artefacts import typed
from optin_cli.artefacts.kinds import description, load_json, stated_kind
from optin_cli.errors import ArtefactError, InputError, OptinError, UsageError, param

Record = TypeVar("Record")
_PROBLEMS_SHOWN = 12


def digest_bytes(*chunks: bytes) -> str:
    """SHA-256 of the chunks, as hex."""
    return digest_chunks(chunks)


def digest_chunks(chunks: Iterable[bytes]) -> str:
    """SHA-256 of chunks that need not be in memory together, as hex."""
    sha = hashlib.sha256()
    for chunk in chunks:
        sha.update(chunk)
    return sha.hexdigest()


def digest_json(data: Any) -> str:
    """SHA-256 of plain data, independent of key order."""
    return digest_bytes(json.dumps(data, sort_keys=True, default=str).encode())


def digest_files(paths: list[Path]) -> str:
    """SHA-256 over files in the given order, with their names."""
    sha = hashlib.sha256()
    for path in paths:
        sha.update(path.name.encode())
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                sha.update(chunk)
    return sha.hexdigest()


def to_json(data: Any, indent: int = 0) -> str:
    """JSON with one line a key, but lists of numbers on one line, so that a mask stays readable."""
    pad, step = " " * indent, "  "
    if isinstance(data, dict) and data:
        inner = ",\n".join(
            f"{pad}{step}{json.dumps(str(key))}: {to_json(value, indent + 2)}" for key, value in data.items()
        )
        return f"{{\n{inner}\n{pad}}}"
    if isinstance(data, list) and any(isinstance(item, dict | list) for item in data):
        inner = ",\n".join(f"{pad}{step}{to_json(item, indent + 2)}" for item in data)
        return f"[\n{inner}\n{pad}]"
    return json.dumps(data)


def read_json(path: Path, what: str, way_out: str | None = None) -> dict[str, Any]:
    """Read one JSON object. `what` names the artefact in errors, `way_out` is what to do without it.

    Raises `UsageError` when the path can't be read, `ArtefactError` when it holds no JSON object.
    """
    try:
        data = load_json(path)
    except OSError as error:
        raise UsageError(f"can't read {what} {path}: {error.strerror}", way_out) from error
    except ValueError as error:
        if found := stated_kind(path):
            raise ArtefactError(f"{path} is a {found}, not {what}", way_out) from error
        kind = description(path)
        why = f"{error}" if kind == "a JSON file" else f"it is {kind}"
        raise ArtefactError(f"{path} is not {what}: {why}", way_out) from error
    if not isinstance(data, dict):
        raise ArtefactError(f"{path} is not {what}: it holds a {type(data).__name__}, not an object", way_out)
    return data


def read_record(
    path: Path,
    record: type[Record],
    what: str,
    marker: str,
    version: int,
    *,
    maker: str,
    optional: tuple[str, ...] = (),
    shallow: tuple[str, ...] = (),
) -> Record:
    """Read a JSON artefact into its dataclass; unknown keys are ignored.

    `marker` is the expected `format`, `version` the newest schema this optin reads, `maker` the command that writes
    such a file; of `shallow` fields only the outermost type is checked. Raises `UsageError` for a path that can't be
    read and `ArtefactError` for another format, a newer version, missing or mistyped fields.
    """
    way_out = f"write one with `{maker}`"
    data = read_json(path, what, way_out)
    if data.get("format") != marker:
        found = stated_kind(path)
        message = f"{path} is a {found}, not {what}" if found else f"{path} is not {what} written by optin"
        raise ArtefactError(message, way_out)
    found = data.get("schema_version")
    if type(found) is not int or found > version:
        raise ArtefactError(
            f"{path} has schema version {found}; this optin reads up to {version}", "update optin"
        )
    wanted = get_type_hints(record)
    problems = [f"{name} is missing" for name in wanted if name not in data and name not in optional]
    for name, hint in wanted.items():
        if name in data:  # what earlier schemas lack, those who read it do without
            plain = (get_origin(hint) or hint) if name in shallow else hint
            problems += typed.problems(data[name], plain, name, complete=found == version)
    if problems:
        listed = ", ".join(problems[:_PROBLEMS_SHOWN]) + (", .." if len(problems) > _PROBLEMS_SHOWN else "")
        raise ArtefactError(f"{path} is a damaged record: {listed}", f"run `{maker}` again")
    return record(**{name: data[name] for name in wanted if name in data})


def check_output(path: Path, kind: str) -> None:
    """Raise `UsageError` unless `path` can be created: its folder exists or can be made and is writable."""
    if not path.name:
        raise UsageError(f"{path} is not a name for a {kind}")
    if kind != "folder":
        check_no_folder(path, kind)
    parent = path.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"can't create the folder {parent}: {error.strerror}") from error
    if not os.access(parent, os.W_OK):
        raise UsageError(f"the folder {parent} is not writable")


def check_no_folder(path: Path | str, kind: str) -> None:
    """Raise `UsageError` where a file is to be written and a folder is: known before any work.

    Text that ends in a slash means a folder, whether it is there or not.
    """
    folder = Path(path)
    if folder.is_dir() or (isinstance(path, str) and path.endswith(("/", os.sep))):
        raise UsageError(
            f"{path} is a folder, not a name for a {kind}", f"give a name in it: {folder / 'NAME'}"
        )


def nearest_path(path: Path) -> str:
    """`did you mean ..?`: what is there under a name spelt like a path that does not exist; '' if nothing is."""
    try:
        there = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, there, n=1, cutoff=0.7)
    return f"did you mean {path.parent / close[0]}?" if close else ""


def check_space(path: Path, needed: int) -> None:
    """Raise `InputError` unless the disk has room for `needed` bytes at `path`."""
    free = shutil.disk_usage(path.absolute().parent).free
    if needed > free:
        raise InputError(
            f"{path} needs {needed / 2**20:.0f} MiB and the disk has {free / 2**20:.0f} MiB left",
            "free some space, or leave the sketch out "
            f"({param('sketch', False, python='sketch_rows=0')}, or a smaller {param('sketch_rows')})",
        )


def _sweep(path: Path) -> None:
    """Clear what a killed process left beside `path`: bring back an output it had moved aside, remove the rest."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.*"):
        pid, _, kind = left.name.removeprefix(f".{path.name}.").partition(".")
        if not pid.isdigit() or kind not in ("tmp", "old") or _is_running(int(pid)):
            continue
        if kind == "old" and not path.exists():
            left.replace(path)
        elif left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; rename it to `path` on success, remove it on any failure."""
    check_output(path, "file")
    _sweep(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _disk_errors(path):
            yield temporary
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it takes the place of `path` on success, vanishes on failure."""
    check_output(path, "folder")
    _sweep(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        with _disk_errors(path):
            temporary.mkdir()
            yield temporary
            if path.exists():
                path.replace(old)
            try:
                temporary.replace(path)
            except BaseException:
                if old.exists():
                    old.replace(path)
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def disk_is_full(error: BaseException) -> bool:
    """Return whether a write failed for want of space, however deep a library has wrapped the error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        cause = cause.__cause__ or cause.__context__
    return any(word in str(error) for word in ("No space left", "File too large", "Disk quota exceeded"))


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turn a failing write, however a library wraps it, into one message."""
    try:
        yield
    except OptinError:
        raise
    except Exception as error:
        if disk_is_full(error):
            raise InputError(
                f"the disk is full: {path} could not be written", "free some space and run it again"
            ) from error
        if isinstance(error, OSError):
            raise InputError(f"can't write {path}: {error}") from error
        raise
