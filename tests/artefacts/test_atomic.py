"""Atomic files and folders: the whole output or nothing, whatever fails on the way."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from optin_cli.artefacts import temporary
from optin_cli.artefacts.files import atomic_dir, atomic_file, check_writable
from optin_cli.errors import ArtefactError, InputError, UsageError

# files and folders side by side: `write` fills the yielded path, `read` gives its content


def write_file(path: Path, content: str) -> None:
    path.write_text(content)


def write_folder(path: Path, content: str) -> None:
    (path / "sub").mkdir()
    (path / "sub" / "file").write_text(content)


def read_file(path: Path) -> str:
    return path.read_text()


def read_folder(path: Path) -> str:
    assert [p.name for p in path.iterdir()] == ["sub"]
    return (path / "sub" / "file").read_text()


both = pytest.mark.parametrize(
    ("atomic", "write", "read"),
    [(atomic_file, write_file, read_file), (atomic_dir, write_folder, read_folder)],
    ids=["file", "folder"],
)


@both
def test_what_was_written_is_there_afterwards_and_nothing_else(tmp_path, atomic, write, read):
    with atomic(tmp_path / "out") as temporary:
        write(temporary, "new")
        assert not (tmp_path / "out").exists()
    assert read(tmp_path / "out") == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@both
def test_an_earlier_output_is_replaced_as_a_whole(tmp_path, atomic, write, read):
    for content in ("old", "new"):
        with atomic(tmp_path / "out") as temporary:
            write(temporary, content)
    assert read(tmp_path / "out") == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@both
@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt(), ArtefactError("bad")], ids=repr)
def test_an_exception_leaves_nothing_and_passes_unchanged(tmp_path, atomic, write, read, error):
    with pytest.raises(type(error)) as caught, atomic(tmp_path / "out") as temporary:
        write(temporary, "half")
        raise error
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []


@both
def test_an_exception_leaves_an_earlier_output_alone(tmp_path, atomic, write, read):
    with atomic(tmp_path / "out") as temporary:
        write(temporary, "old")
    with pytest.raises(ValueError, match="wrong"), atomic(tmp_path / "out") as temporary:
        write(temporary, "half")
        raise ValueError("wrong")
    assert read(tmp_path / "out") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@both
def test_a_failing_rename_leaves_an_earlier_output_alone(tmp_path, atomic, write, read, monkeypatch):
    with atomic(tmp_path / "out") as temporary:
        write(temporary, "old")
    replace = Path.replace

    def fail(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError(errno.EIO, "Input/output error")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(InputError, match="can't write"), atomic(tmp_path / "out") as temporary:
        write(temporary, "new")
    assert read(tmp_path / "out") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_is_never_replaced_by_a_file(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UsageError, match="is a folder"), atomic_file(tmp_path / "out") as temporary:
        write_file(temporary, "new")
    assert (tmp_path / "out" / "mine").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# a full disk


def full_disk(code: int = errno.ENOSPC) -> OSError:
    return OSError(code, os.strerror(code))


def raise_wrapped(error: OSError) -> None:
    try:
        raise error
    except OSError as cause:
        raise RuntimeError("the library's own words") from cause


def raise_message(error: OSError) -> None:
    raise RuntimeError(f"I/O error: {error.strerror} (os error {error.errno})")


def raise_plain(error: OSError) -> None:
    raise error


@both
@pytest.mark.parametrize("raises", [raise_plain, raise_wrapped, raise_message])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG], ids=os.strerror)
def test_a_full_disk_is_said_plainly_and_leaves_nothing(tmp_path, atomic, write, read, raises, code):
    with pytest.raises(InputError, match="the disk is full") as caught, atomic(tmp_path / "out") as temporary:
        write(temporary, "half")
        raises(full_disk(code))
    assert str(tmp_path / "out") in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_only_when_flushing_leaves_nothing(tmp_path, monkeypatch):
    def fail(descriptor: int) -> None:
        raise full_disk()

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(InputError, match="the disk is full"), atomic_file(tmp_path / "out") as temporary:
        write_file(temporary, "whole")
    assert list(tmp_path.iterdir()) == []


@both
def test_another_failing_write_is_an_input_error_with_its_reason(tmp_path, atomic, write, read):
    with pytest.raises(InputError, match=r"can't write .*Input/output error"), atomic(tmp_path / "out"):
        raise full_disk(errno.EIO)
    assert list(tmp_path.iterdir()) == []


def test_an_error_about_something_else_is_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), atomic_file(tmp_path / "out") as temporary:
        write_file(temporary, "half")
        raise RuntimeError("shapes differ")


PROGRAM = """
import json, os, resource, sys
from pathlib import Path

tests, folder, limits = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
sys.path.insert(0, tests)
import numpy as np
from helpers.artefacts import tiny_ranking
from safetensors.numpy import save_file
from optin_cli.artefacts.files import atomic_dir, atomic_file
from optin_cli.artefacts.ranking import write_ranking
from optin_cli.errors import OptinError

def stream(path):
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        for _ in range(1000):
            file.write(bytes(4096))

def text(path):
    with atomic_file(path) as temporary:
        temporary.write_text("x" * 4_000_000)

def safetensors(path):
    with atomic_dir(path) as temporary:
        (temporary / "config.json").write_text("{}")
        save_file({"w": np.ones(500_000)}, temporary / "model.safetensors")

def ranking(path):
    write_ranking(path, tiny_ranking(blocks=12, neurons=3072))

def attempt(write, limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        write(folder / "out")
        return "written"
    except OptinError as error:
        return f"{type(error).__name__}: {error.what.partition(':')[0]}"
    except Exception as error:
        return repr(error)

for write in (stream, text, safetensors, ranking):
    for limit in limits:
        receive, send = os.pipe()
        child = os.fork()  # a process for each limit: one that crashes must not hide the next
        if child == 0:
            os.write(send, attempt(write, limit).encode())
            sys.exit()
        os.close(send)
        said = os.read(receive, 10_000).decode()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        left = os.listdir(folder)
        if (said, code, left) != ("InputError: the disk is full", 0, []):
            print(f"{write.__name__} up to {limit} bytes: {said!r}, exit code {code}, left {left}")
            for name in left:
                (folder / name).unlink()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_FSIZE")
def test_every_kind_of_write_survives_a_real_limit_on_the_file_size(tmp_path):
    """The kernel refuses the write, and each library takes that in its own way."""
    limits = json.dumps([2048, 100_000, 1_000_000])
    tests = str(Path(__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, tests, str(tmp_path), limits],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""


# what killed runs leave, and what others are writing


def left_by(path: Path, program: str) -> Path:
    """The temporary name beside `path` of a process that was killed while it wrote; `program` fills `made`."""
    script = f"""
import os, signal
from pathlib import Path
from optin_cli.artefacts import temporary
from optin_cli.artefacts.files import atomic_dir, atomic_file
path = Path({str(path)!r})
{program}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    return next(iter(path.parent.glob(f".{path.name}.*")))


KILLED = "    os.kill(os.getpid(), signal.SIGKILL)"
FILE = f"with atomic_file(path) as made:\n    made.write_text('half')\n{KILLED}"
ASIDE = f"with atomic_dir(path) as made:\n    path.replace(temporary.beside(path, 'old'))\n{KILLED}"


def test_leftovers_of_a_killed_run_are_swept_away(tmp_path):
    left = left_by(tmp_path / "m.h5", FILE)
    assert left.read_text() == "half"
    other = left_by(tmp_path / "other.h5", FILE)
    with atomic_file(tmp_path / "m.h5") as writing:
        # another run beside this one sweeps what is dead alone
        with atomic_file(tmp_path / "m.h5") as second:
            second.write_text("second")
        assert writing.exists() and not left.exists()
        writing.write_text("whole")
    assert (tmp_path / "m.h5").read_text() == "whole"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([other.name, "m.h5"])


def test_an_output_that_a_killed_run_had_moved_aside_comes_back(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("the only copy")
    left_by(tmp_path / "model", ASIDE)
    assert not (tmp_path / "model").exists()
    with pytest.raises(RuntimeError), atomic_dir(tmp_path / "model"):
        raise RuntimeError
    assert (tmp_path / "model" / "weights").read_text() == "the only copy"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@both
def test_a_process_of_the_same_id_is_no_obstacle(tmp_path, atomic, write, read):
    """In containers every process has the id 1."""
    (tmp_path / f".out.{os.getpid()}.tmp").mkdir()
    with atomic(tmp_path / "out") as temporary:
        write(temporary, "new")
    assert read(tmp_path / "out") == "new"


@pytest.mark.parametrize(("age", "stays"), [(60, True), (7200, False)], ids=["writing", "silent"])
@pytest.mark.parametrize(
    "owner", ["0123456789ab.0123456789abcdef", "4711"], ids=["elsewhere", "earlier version"]
)
def test_files_of_another_machine_are_swept_when_it_gives_no_sign_of_life(tmp_path, owner, age, stays):
    other = tmp_path / f".m.h5.{owner}.tmp"
    other.write_text("another machine is writing")
    then = other.stat().st_mtime - age
    os.utime(other, (then, then))
    with atomic_file(tmp_path / "m.h5") as temporary:
        temporary.write_text("whole")
    assert other.exists() == stays


def test_what_is_being_written_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(temporary, "HEARTBEAT", 0.05)
    monkeypatch.setattr(temporary._heartbeat, "process", 0)  # a thread with that pause
    with atomic_file(tmp_path / "m.h5") as made:
        made.write_text("half")
        os.utime(made, (0, 0))
        for _ in range(200):
            if made.stat().st_mtime > 0:
                break
            time.sleep(0.05)
        assert made.stat().st_mtime > 0


def test_a_lock_is_free_once_released_whoever_still_has_it_open(tmp_path):
    (tmp_path / "lock").touch()
    lock = temporary.hold(tmp_path / "lock")
    inherited = os.dup(lock)  # as a process has that was forked a moment ago
    temporary.release(lock)
    again = temporary.hold(tmp_path / "lock")
    assert again is not None
    temporary.release(again)
    os.close(inherited)


def test_a_forked_process_does_not_hold_what_its_parent_held(tmp_path):
    (tmp_path / "lock").touch()
    lock = temporary.hold(tmp_path / "lock")
    assert temporary.hold(tmp_path / "lock") is None
    up, say = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(say, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(up, 1)
    temporary._heartbeat.paths.pop(lock)
    os.close(lock)  # all that is done for a parent that is killed
    again = temporary.hold(tmp_path / "lock")
    os.kill(child, 9)
    os.waitpid(child, 0)
    assert again is not None
    temporary.release(again)


# links, names and places


@both
@pytest.mark.parametrize("there", [True, False], ids=["there", "to be made"])
def test_a_symbolic_link_is_written_through(tmp_path, atomic, write, read, there):
    (tmp_path / "link").symlink_to("disk/target")
    (tmp_path / "disk").mkdir()
    if there:
        with atomic(tmp_path / "disk" / "target") as made:
            write(made, "old")
    for content in ("new", "newer"):
        with atomic(tmp_path / "link") as made:
            write(made, content)
        assert (tmp_path / "link").is_symlink() and read(tmp_path / "disk" / "target") == content
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "link"]
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["target"]


@both
def test_a_link_to_itself_is_a_usage_error(tmp_path, atomic, write, read):
    (tmp_path / "link").symlink_to("link")
    with pytest.raises(UsageError, match="leads to itself"), atomic(tmp_path / "link"):
        pass


@both
def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path, atomic, write, read):
    with atomic(tmp_path / ("a" * 255)) as made:
        write(made, "new")
    assert read(tmp_path / ("a" * 255)) == "new"
    with pytest.raises(UsageError, match="name too long"), atomic(tmp_path / ("a" * 256)):
        pass


def test_a_place_is_tried_before_any_work_and_left_as_it_was(tmp_path):
    check_writable(tmp_path / "new" / "folder" / "m.json", "mask")
    assert list(tmp_path.iterdir()) == []


def test_a_mount_point_can_not_be_replaced():
    with pytest.raises(UsageError, match="mount point"):
        check_writable(Path("/proc"), "folder")
    with pytest.raises(UsageError, match="/proc"):  # nothing can be made in it, whoever asks
        check_writable(Path("/proc/new"), "folder")


# scratch folders


@pytest.fixture
def scratch_in(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_scratch_folder_is_gone_at_the_end_and_so_is_that_of_a_killed_run(scratch_in):
    (scratch_in / "optin-mine").mkdir()  # somebody else's
    program = f"import tempfile; tempfile.tempdir = {str(scratch_in)!r}\nwith temporary.scratch():\n{KILLED}"
    with pytest.raises(StopIteration):
        left_by(scratch_in / "m.h5", program)
    assert len(list(scratch_in.iterdir())) == 2
    with temporary.scratch() as folder:
        (folder / "x").touch()
        with temporary.scratch():
            assert folder.exists()
    assert [p.name for p in scratch_in.iterdir()] == ["optin-mine"]


def test_what_is_swept_before_it_is_locked_is_made_again(scratch_in, monkeypatch):
    """Another run may find a new folder, or file, that nobody holds yet: removed before it is opened, or just after."""
    lock, swept = temporary._lock, []

    def late(path):
        if len(swept) < 4:
            swept.append(path)
            if len(swept) % 2:
                temporary.remove(path)
                return lock(path)
            found = lock(path)
            temporary.remove(path)
            return found
        return lock(path)

    monkeypatch.setattr(temporary, "_lock", late)
    with temporary.scratch() as folder:
        assert folder.is_dir() and len(swept) == 4
        assert temporary.hold(folder) is None
    swept.clear()
    with atomic_file(scratch_in / "f") as path:
        path.write_text("x")
    assert (scratch_in / "f").read_text() == "x" and len(swept) == 4
    assert [path.name for path in scratch_in.iterdir()] == ["f"]


def test_a_run_that_sweeps_holds_what_it_removes(scratch_in, monkeypatch):
    """Else its owner could lock it between the look and the removal."""
    left = scratch_in / f"optin-{temporary.machine()}-{'0' * 16}"
    left.mkdir()
    seen = []
    remove = temporary.remove
    monkeypatch.setattr(
        temporary, "remove", lambda path: (seen.append((path, temporary.hold(path))), remove(path))
    )
    with temporary.scratch():
        assert seen == [(left, None)] and not left.exists()


@pytest.mark.parametrize(("age", "stays"), [(60, True), (7200, False)], ids=["writing", "silent"])
def test_where_nothing_can_be_locked_the_time_stamp_says_who_is_alive(scratch_in, monkeypatch, age, stays):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    left = scratch_in / f"optin-{temporary.machine()}-{'0' * 16}"
    left.mkdir()
    os.utime(left, (time.time() - age,) * 2)
    monkeypatch.setattr(temporary.fcntl, "flock", no_locks)
    with temporary.scratch() as folder:
        assert folder.is_dir() and left.exists() == stays


def test_runs_that_begin_together_leave_each_other_their_folders(scratch_in):
    """Four processes make and sweep as fast as they can: nobody's folder goes while it is in use."""
    program = (
        "import sys, tempfile; tempfile.tempdir = sys.argv[1]\n"
        "from optin_cli.artefacts import temporary\n"
        "for i in range(150):\n"
        "    with temporary.scratch() as folder:\n"
        "        (folder / 'x').write_text('x')\n"
        "        assert (folder / 'x').read_text() == 'x'\n"
    )
    command = [sys.executable, "-c", program, str(scratch_in)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    errors = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0] * 4, errors
    assert not list(scratch_in.iterdir())
