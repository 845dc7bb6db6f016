"""Unfinished work that survives a kill: finished items, each in a file, beside the artefact-to-be.

An item is renamed into place whole, so whatever moment the process dies at, the items that are there are good.
The same inputs pick them up; other inputs throw them away and say why.
"""

from __future__ import annotations

import logging
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from optin_cli.artefacts import temporary
from optin_cli.artefacts.files import atomic_file, check_output, digest_json, read_json, to_json
from optin_cli.errors import OptinError, UsageError

log = logging.getLogger("optin")
_LOCK = "lock"


class Busy(UsageError):
    """Another run works on the same artefact."""

    def __init__(self, target: Path, owner: str, *, same: bool) -> None:
        super().__init__(
            f"another run is scoring to {target} ({owner})", "wait until it has ended, or choose another name"
        )
        self.owner = owner
        self.same = same
        """Whether it does this very work."""


class Partial:
    """Items of one unfinished artefact, in `<folder>/.<name>.partial/`.

    One run at a time works on them: `announce` says that this process speaks for it, and holds their lock.
    """

    def __init__(self, target: Path, identity: dict[str, Any], announce: bool = True) -> None:
        """Open what an earlier run left for the same `identity`; clear anything else.

        Raises `Busy` where another run is at it.
        """
        check_output(target, "file")
        self.target = target
        self.folder = _folder(target)
        self.lock: int | None = None
        self._gone = False
        """The next folder of that name is another run's."""
        stamp, there = self.folder / "identity.json", self.folder.exists()
        self.folder.mkdir(exist_ok=True)
        if announce:
            self.lock = self._locked()
            if self.lock is None:
                raise Busy(
                    target, temporary.owner_of(self.folder / _LOCK), same=not _changes(stamp, identity)
                )
        if there and len(self):
            if changed := _changes(stamp, identity):
                log.warning("starting over: the unfinished run beside %s had another %s", target, changed)
                self._clear()
            elif announce:
                log.info("resuming: %d parts of %s are done", len(self), target)
        elif there and _changes(stamp, identity):
            self._clear()
        if not stamp.exists():
            with atomic_file(stamp) as made:
                made.write_text(to_json({**identity, "digest": digest_json(identity)}))

    def _locked(self) -> int | None:
        """The lock; None where another run has it. One that ends removes its folder."""
        while True:
            try:
                return temporary.hold_alone(self.folder / _LOCK)
            except FileNotFoundError:
                self.folder.mkdir(exist_ok=True)

    def __len__(self) -> int:
        return len(list(self.folder.glob("*.npz")))

    def get(self, key: str) -> dict[str, np.ndarray] | None:
        """The arrays of a finished item, or None."""
        path = self.folder / f"{key}.npz"
        try:
            with np.load(path, allow_pickle=False) as data:
                return dict(data)
        except FileNotFoundError:
            return None
        except (
            OSError,
            ValueError,
            EOFError,
            BadZipFile,
        ) as error:  # a disk that forgets: the item is done again
            log.warning("a part of the unfinished run is damaged and done again: %s (%s)", path, error)
            return None

    def put(self, key: str, arrays: dict[str, np.ndarray]) -> None:
        with atomic_file(self.folder / f"{key}.npz") as made, made.open("wb") as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]

    def nbytes(self) -> int:
        """Return the bytes of the finished items on disk."""
        return sum(path.stat().st_size for path in self.folder.glob("*.npz"))

    def _clear(self) -> None:
        for item in self.folder.iterdir():
            if item.name != _LOCK:
                temporary.remove(item)

    def discard(self) -> None:
        """Remove everything: the artefact itself is written."""
        away, self._gone = temporary.beside(self.target, "tmp"), True
        with suppress(OSError):  # it is gone
            self.folder.replace(away)  # at once: the next run may begin in a folder of that name
        temporary.remove(away)

    def close(self) -> None:
        """Let another run have what is there; a folder in which nothing was finished goes with its run."""
        if self.lock is not None and not self._gone and not len(self):
            self.discard()
        temporary.let_go(self.folder / _LOCK, self.lock)


def clear_parts(target: Path) -> None:
    """Remove what an unfinished run left beside `target`, unless one is at it."""
    folder = _folder(target)
    if not temporary.is_held(folder / _LOCK):
        shutil.rmtree(folder, ignore_errors=True)


def _folder(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


def _changes(stamp: Path, identity: dict[str, Any]) -> str:
    """Names of what differs from the earlier run's identity; empty when it is the same."""
    try:
        earlier = read_json(stamp, "the stamp of an unfinished run")
    except OptinError:
        return "start (its stamp is missing)"
    if earlier.pop("digest", None) == digest_json(identity):
        return ""
    names = [k for k in identity if digest_json({"": earlier.get(k)}) != digest_json({"": identity.get(k)})]
    return ", ".join(names) or "layout"
