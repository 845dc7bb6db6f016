"""Digests, JSON, and writes that leave either the whole file or nothing under its final name."""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

from optin_cli.artefacts import temporary, typed
from optin_cli.artefacts.kinds import description, load_json, stated_kind
from optin_cli.errors import ArtefactError, InputError, OptinError, UsageError, param

Record = TypeVar("Record")
_PROBLEMS_SHOWN = 12
NEEDS = "needs_optin"
"""The entry of files of later schemas with the oldest optin that reads them."""
_VERSION = re.compile(r"\d[\w.+-]{0,30}")


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
    return as_record(data, path, record, version, maker=maker, optional=optional, shallow=shallow)


def as_record(
    data: Mapping[str, Any],
    path: Path,
    record: type[Record],
    version: int,
    *,
    maker: str,
    optional: tuple[str, ...] = (),
    shallow: tuple[str, ...] = (),
) -> Record:
    """The JSON object of an artefact as its dataclass; see `read_record`. `path` names it in errors."""
    found = data.get("schema_version")
    if type(found) is not int or found > version:
        raise ArtefactError(
            f"{path} has schema version {found}; this optin reads up to {version}", update_hint(data)
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


def update_hint(data: Mapping[str, Any]) -> str:
    """The optin to install for a file of a later schema: the one that it says it needs, else the one that wrote it."""
    steps = data.get("history")
    holders = (data, *(steps[-1:] if isinstance(steps, list) else ()))
    said = [data.get(NEEDS), *(_written_by(holder) for holder in holders)]
    version = next((one for one in said if isinstance(one, str) and _VERSION.fullmatch(one)), None)
    wanted = f"'optin>={version}'" if version else "optin"
    return f"update optin: pip install -U {wanted}"


def _written_by(holder: Any) -> Any:
    versions = holder.get("versions") if isinstance(holder, dict) else None
    return versions.get("optin") if isinstance(versions, dict) else None


def check_output(path: Path, kind: str) -> None:
    """Make the folder of an output. Raises `UsageError` where `check_writable` does."""
    check_writable(path, kind)
    try:
        target(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"can't create the folder {path.parent}: {error.strerror}") from error


def check_replaceable(output: Path, record: str, maker: str, replaced: str, read: Path | None) -> None:
    """Raise `UsageError` unless the folder `output` can be written, and is free, or has the `record` of its `maker`,
    which replaces such models alone, and is not the folder that is `read`.

    Raises `InputError` where the disk is full.
    """
    check_writable(output, "folder")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / record).is_file():
        raise UsageError(
            f"{output} exists and was not made by {maker}",
            f"choose another output; {param('force', True)} replaces {replaced} only",
        )
    if read is not None and output.resolve() == read.resolve():
        raise UsageError(f"{output} is the model being read", "choose another output")


def check_writable(path: Path, kind: str) -> None:
    """Raise `UsageError` unless `path` can be created, known before any work: nothing is left behind.

    Raises `InputError` where the disk is full.
    """
    if not path.name:
        raise UsageError(f"{path} is not a name for a {kind}")
    if kind != "folder":
        check_no_folder(path, kind)
    try:
        real = target(path)
    except OSError as error:
        raise UsageError(f"can't write {path}: {error.strerror}") from error
    if kind == "folder" and os.path.ismount(real):
        raise UsageError(
            f"{path} is a mount point, which can't be replaced", f"give a name in it: {path / 'NAME'}"
        )
    there = real.parent
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        raise UsageError(f"can't create the folder {path.parent}: {there} is a file")
    if not os.access(there, os.W_OK):
        raise UsageError(f"the folder {there} is not writable")
    trial = temporary.beside(there / real.name, "tmp")
    try:
        trial.mkdir()
        trial.rmdir()
    except OSError as error:
        if disk_is_full(error):
            raise InputError(f"the disk is full: {path} can't be written", "free some space") from error
        raise UsageError(f"can't write {path}: {error.strerror}") from error


def target(path: Path) -> Path:
    """The path that is written for an output: of a symbolic link what it leads to, whether that is there or not."""
    if not path.is_symlink():
        return path
    real = Path(os.path.realpath(path))
    if real.is_symlink():
        raise UsageError(f"{path} is a symbolic link that leads to itself")
    return real


def renew(path: Path) -> None:
    """Give an output that is reused the time of now: else make, and whoever goes by times, finds it old for ever.

    Of a folder its files are renewed, too: a rule may be about one of them.
    """
    with suppress(OSError):  # it may be somebody else's
        for one in (*(path.iterdir() if path.is_dir() else ()), path):
            os.utime(one, follow_symlinks=False)


def check_no_folder(path: Path | str, kind: str) -> None:
    """Raise `UsageError` where a file is to be written and a folder is: known before any work.

    Text that ends in a slash means a folder, whether it is there or not.
    """
    folder = Path(path)
    if _is_folder(folder) or (isinstance(path, str) and path.endswith(("/", os.sep))):
        raise UsageError(
            f"{path} is a folder, not a name for a {kind}", f"give a name in it: {folder / 'NAME'}"
        )


def _is_folder(path: Path) -> bool:
    """Return whether a folder is there; False for a name that no file system takes."""
    try:
        return path.is_dir()
    except OSError:
        return False


def nearest_path(path: Path) -> str:
    """`did you mean ..?`: what is there under a name spelt like a path that does not exist; '' if nothing is."""
    try:
        there = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, there, n=1, cutoff=0.7)
    return f"did you mean {path.parent / close[0]}?" if close else ""


def check_space(path: Path, needed: float, way_out: str | None = None) -> None:
    """Raise `InputError` unless the disk has room for `needed` bytes at `path`."""
    there = target(path.absolute()).parent
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if needed > free:
        raise InputError(
            f"{path} needs {needed / 2**20:.0f} MiB and the disk has {free / 2**20:.0f} MiB left",
            f"free some space{f', or {way_out}' if way_out else ''}",
        )


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; rename it to `path` on success, remove it on any failure.

    A symbolic link is written through.
    """
    check_output(path, "file")
    real = target(path)
    with _disk_errors(path), temporary.made(real, folder=False) as made:
        yield made
        with made.open("rb") as stream:
            os.fsync(stream.fileno())
        made.replace(real)


@contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it takes the place of `path` on success, vanishes on failure.

    A symbolic link is written through.
    """
    check_output(path, "folder")
    real = target(path)
    with _disk_errors(path), temporary.made(real, folder=True) as made:
        yield made
        if not real.exists():
            made.replace(real)
            return
        old, lock = temporary.beside(real, "old"), temporary.hold(real)
        try:
            real.replace(old)
            try:
                made.replace(real)
            except BaseException:
                old.replace(real)
                raise
        finally:
            temporary.remove(old)
            temporary.release(lock)


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
