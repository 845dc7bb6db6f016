"""Temporary files and folders: names that no two runs share, and who is still using them.

A name is `.NAME.<machine>.<random>.tmp`: a process id alone is the same in every container. Whoever writes one holds
a lock of the kernel on it, which ends with the process however it dies. Another machine on the same disk does not see
that lock everywhere: it goes by the time stamp, which is renewed as long as the process lives.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import platform
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

HEARTBEAT = 20.0
"""Seconds between two renewals of the time stamps of what this process uses."""
ABANDONED = 3600.0
"""Seconds without a renewal after which another machine's temporary files are removed."""
SILENCE = 90.0
"""The same for the lock of a piece of work, where somebody waits."""
_POLL = 1.0
_LONGEST = 120
"""Bytes of an output's name that its temporary name repeats: file systems allow 255."""
_KINDS = ("tmp", "old")
_LEFT = re.compile(r"\.(?:([0-9a-f]{12})\.([0-9a-f]{16})|\d+)\.(tmp|old)$")
_SCRATCH = re.compile(r"optin-([0-9a-f]{12})-[0-9a-f]{16}$")


def machine() -> str:
    """12 hexadecimal digits that all processes of this machine share until it is started again, in containers too."""
    try:
        booted = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:  # not Linux
        booted = platform.node()
    return hashlib.sha256(booted.encode()).hexdigest()[:12]


def beside(path: Path, kind: str) -> Path:
    """A new name of a kind (`tmp`, `old`) for what will take the name of `path`, or has had it."""
    return path.with_name(f"{_prefix(path)}.{machine()}.{secrets.token_hex(8)}.{kind}")


def _prefix(path: Path) -> str:
    name = path.name.encode()
    if len(name) <= _LONGEST:
        return f".{path.name}"
    return f".{name[:_LONGEST].decode(errors='ignore')}-{hashlib.sha256(name).hexdigest()[:12]}"


class _Heartbeat:
    """Renews time stamps in a thread of its own."""

    def __init__(self) -> None:
        self.paths: dict[int, Path] = {}
        self.process = 0
        """The process whose thread it is: a forked one has none."""

    def add(self, lock: int, path: Path) -> None:
        self.paths[lock] = path
        if self.process != os.getpid():
            self.process = os.getpid()
            threading.Thread(target=self._beat, daemon=True, name="optin heartbeat").start()

    def _beat(self) -> None:
        pause = threading.Event()
        while not pause.wait(HEARTBEAT):
            for path in list(self.paths.values()):
                with suppress(OSError):  # it has its final name by now
                    os.utime(path)

    def forget(self) -> None:
        """In a forked process: what the parent holds is not held on by a child that outlives it."""
        for lock in self.paths:
            os.close(lock)
        self.paths = {}


_heartbeat = _Heartbeat()
os.register_at_fork(after_in_child=_heartbeat.forget)


def hold(path: Path) -> int | None:
    """Lock an existing file or folder for as long as this process lives; None where another process holds it.

    Where the file system knows no locks, its time stamp alone says that it is in use.
    """
    lock = _lock(path)
    if lock is not None:
        _heartbeat.add(lock, path)
    return lock


def release(lock: int | None) -> None:
    if lock is not None and _heartbeat.paths.pop(lock, None) is not None:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_UN)  # a process that was just forked has it open, too
        os.close(lock)


def _lock(path: Path) -> int | None:
    """The same without a sign of life."""
    lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    if _locked(lock) is False:
        os.close(lock)
        return None
    return lock


def _locked(lock: int) -> bool | None:
    """Lock what is open; False where another process holds it, None where the file system knows no locks."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def hold_alone(path: Path) -> int | None:
    """Lock the file `path`, made if it is absent, for work that one process does; None where another does it.

    The file names machine, process and host. A process of another machine is taken for dead after `SILENCE` seconds
    without a sign of life, which are waited for: schedulers start a job again elsewhere.
    """
    while True:
        path.touch()
        lock = _lock(path)
        if lock is None:
            return None
        if _is_that_file(lock, path):
            break
        os.close(lock)  # whoever held it has finished and removed it
    owner = path.read_text().split()[:1]
    if owner not in ([], [machine()]) and _is_alive(path):
        os.close(lock)
        return None
    path.write_text(f"{machine()} {os.getpid()} {platform.node()}")
    _heartbeat.add(lock, path)
    return lock


def _is_that_file(lock: int, path: Path) -> bool:
    """Whether a file that is open is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(lock), path.stat())
    except FileNotFoundError:
        return False


def is_held(path: Path) -> bool:
    """Whether a process of this machine holds a lock; False where there is no such file."""
    try:
        lock = _lock(path)
    except FileNotFoundError:
        return False
    if lock is not None:
        os.close(lock)
    return lock is None


def owner_of(path: Path) -> str:
    """`process 4711 on node7`: who holds what `hold_alone` locked."""
    try:
        _, process, host = path.read_text().split()
    except (OSError, ValueError):
        return "another process"
    return f"process {process} on {host}"


def let_go(path: Path, lock: int | None) -> None:
    """End what `hold_alone` began; the next process need not wait."""
    if lock in _heartbeat.paths:
        with suppress(OSError):
            path.write_text("")
        release(lock)


def _is_alive(path: Path) -> bool:
    """Return whether the time stamp of a file that another machine holds is renewed. Waits for that."""
    before = path.stat().st_mtime
    while _clock(path) - before < SILENCE:
        if path.stat().st_mtime != before:
            return True
        time.sleep(_POLL)
    return False


def _clock(path: Path) -> float:
    """The time of the disk's own clock."""
    with made(path.with_name("clock"), folder=False) as trial:
        return trial.stat().st_mtime


@contextmanager
def made(path: Path, *, folder: bool) -> Iterator[Path]:
    """A new empty file or folder beside `path`, which nobody else takes for abandoned; removed if it is there still.

    What killed runs left beside `path` is cleared.
    """
    temporary, lock = _new(partial(beside, path, "tmp"), 0o777 if folder else None)
    try:
        sweep(path, temporary.stat().st_mtime)
        yield temporary
    finally:
        remove(temporary)
        release(lock)


def _new(name: Callable[[], Path], mode: int | None) -> tuple[Path, int]:
    """A new empty folder of this mode, or for None a file, and the lock on it.

    Before it is locked it looks like what a killed run left: where another run's sweep was quicker, a next one is made.
    """
    while True:
        path = name()
        if mode is None:
            path.touch(exist_ok=False)
        else:
            path.mkdir(mode)
        with suppress(FileNotFoundError):
            lock = hold(path)
            if lock is not None and _is_that_file(lock, path):
                return path, lock
            release(lock)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sweep(path: Path, now: float) -> None:
    """Clear what killed runs left beside `path`: bring back an output that one had moved aside, remove the rest.

    `now` is the time of the disk's own clock.
    """
    prefix = _prefix(path)
    for left in path.parent.glob(f"{glob.escape(prefix)}.*"):
        found = _LEFT.fullmatch(left.name.removeprefix(prefix))
        if found is None:
            continue
        with suppress(OSError), _abandoned(left, found[1], now) as gone:  # another run is clearing it as well
            if gone and found[3] == "old" and not path.exists():
                left.replace(path)
            elif gone:
                remove(left)


@contextmanager
def _abandoned(left: Path, owner: str | None, now: float) -> Iterator[bool]:
    """Whether whoever made a temporary file is gone; nobody begins to use it within the context.

    `owner` is its machine; None in names of earlier versions.
    """
    with ExitStack() as stack:
        try:
            gone = now - left.lstat().st_mtime > ABANDONED
            if owner == machine():
                lock = os.open(left, os.O_RDONLY | os.O_NOFOLLOW)
                stack.callback(os.close, lock)
                free = _locked(lock)
                gone = gone if free is None else free
        except OSError:  # gone by now, or somebody else's
            gone = False
        yield gone


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder in TMPDIR, removed at the end. Those that killed runs left there are removed, too."""
    home = Path(tempfile.gettempdir())
    folder, lock = _new(lambda: home / f"optin-{machine()}-{secrets.token_hex(8)}", 0o700)
    try:
        now = folder.stat().st_mtime
        for left in home.glob("optin-*"):
            found = _SCRATCH.fullmatch(left.name)
            if not found or left == folder:
                continue
            with suppress(OSError), _abandoned(left, found[1], now) as gone:
                if gone and left.lstat().st_uid == os.getuid():
                    remove(left)
        yield folder
    finally:
        remove(folder)
        release(lock)
