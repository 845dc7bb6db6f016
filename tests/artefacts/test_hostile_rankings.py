"""Rankings that somebody made to do harm, or that a disk has damaged: refused by their headers, in bounded time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers.artefacts import tiny_ranking
from helpers.rankings import as_plain, refused, resealed

from optin_cli.artefacts import ranking as rankings
from optin_cli.artefacts import sealed
from optin_cli.artefacts.ranking import read_ranking, read_sketch, write_ranking
from optin_cli.artefacts.sketch import Sketch
from optin_cli.errors import ArtefactError

SCORE = "sites/blocks.1.heads/score"
HUGE = 3 * 10**9
Edit = Callable[[h5py.File], None]


def test_a_ranking_begins_with_a_line_that_says_what_it_is(path):
    first = path.read_bytes().partition(b"\n")[0].decode()
    assert first.startswith("optin ranking: HDF5 from byte 512 on; sha256 of that: ")
    assert len(first.rpartition(" ")[2]) == 64
    with h5py.File(path) as file:  # others read it as they read any HDF5 file
        assert file.userblock_size == 512 and "sites" in file


def test_a_hole_of_zeros_is_found_before_hdf5_reads_the_file(path, monkeypatch):
    """Some of these keep the HDF5 library busy for ever."""
    content = path.read_bytes()
    monkeypatch.setattr(h5py, "File", lambda *_: pytest.fail("HDF5 has read it"))
    for start in range(0, len(content) - 344, 211):
        if any(content[start : start + 344]):
            path.write_bytes(content[:start] + bytes(344) + content[start + 344 :])
            refused(path)


def declared(file: h5py.File, name: str) -> None:
    """80 KB in which 3 * 10^9 numbers are declared."""
    del file[name]
    kind = "i8" if name == "row_ids" else "f8"
    file.create_dataset(name, shape=(HUGE,), dtype=kind, chunks=(2**20,), compression="gzip")


def all_of_them(file: h5py.File) -> None:
    """Shapes that fit each other, and no memory."""
    group = file["sites/blocks.1.heads"]
    group.attrs["units"] = HUGE
    for name, shape in {"score": (), "output": (), "trajectory": (2,), "by_batch": (2,)}.items():
        first = (2, HUGE) if name == "by_batch" else (HUGE,)
        del group[name]
        group.create_dataset(name, shape=(*first, *shape), dtype="f4", chunks=True, compression="gzip")


def virtual(file: h5py.File) -> None:
    del file[SCORE]
    layout = h5py.VirtualLayout(shape=(4,), dtype="f8")
    layout[...] = h5py.VirtualSource("nowhere.h5", "/x", shape=(4,))
    file.create_virtual_dataset(SCORE, layout)


def external(file: h5py.File) -> None:
    del file[SCORE]
    file.create_dataset(SCORE, shape=(4,), dtype="f8", external=[("/etc/hostname", 0, 32)])


def linked(link: object) -> Edit:
    def edit(file: h5py.File) -> None:
        del file[SCORE]
        file[SCORE] = link

    return edit


def filtered(file: h5py.File) -> None:
    """A filter that HDF5 would look for in a plugin."""
    del file[SCORE]
    file.create_dataset(SCORE, data=np.ones(4), compression="lzf")


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda file: declared(file, SCORE), "has the shape (3000000000,)"),
        (lambda file: declared(file, "row_ids"), "declares more than a file of this size"),
        (all_of_them, "declares more than a file of this size"),
        (virtual, "is not stored plainly"),
        (external, "is not stored plainly"),
        (filtered, "is not stored plainly"),
        (linked(h5py.SoftLink("/row_ids")), "is a link"),
        (linked(h5py.ExternalLink("/etc/hostname", "/x")), "is a link"),
        (lambda file: file.attrs.create("model", "[" * 100_000), "nested too deeply"),
        (lambda file: file.attrs.create("settings", '{"x": ' + "9" * 5000 + "}"), "too many digits"),
        (lambda file: file.attrs.modify("model", "{}"), "model.id is missing"),
        (lambda file: file.attrs.modify("dense", '{"params": "many"}'), "dense.params must be a whole number"),
        (lambda file: file.attrs.create("tokens", np.ones(4)), "the attribute tokens has the shape"),
    ],
    ids=[
        "declared", "rows", "units", "virtual", "external", "filter", "soft", "link", "deep", "digits", "empty", "type",
        "attribute",
    ],
)  # fmt: skip
def test_what_the_headers_declare_is_checked_before_it_is_read(path, edit, says):
    with h5py.File(path, "r+") as file:
        edit(file)
    assert says in refused(resealed(path))


@pytest.mark.parametrize("name", ["examples", "output/blocks.0.heads"])
def test_a_sketch_that_declares_too_much_is_refused(path, name):
    values = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    write_ranking(path, tiny_ranking(), Sketch(np.arange(8), {}, {"blocks.0.heads": values}))
    with h5py.File(path, "r+") as file:
        del file[f"sketch/{name}"]
        shape, kind = ((HUGE,), "i8") if name == "examples" else ((8, HUGE), "f2")
        made = file.create_dataset(f"sketch/{name}", shape=shape, dtype=kind, chunks=True, compression="gzip")
        made.attrs["scale"] = 1.0
    with pytest.raises(ArtefactError, match="declares more"):
        read_sketch(resealed(path))


def of_an_earlier_version(path: Path) -> Path:
    """A ranking as it was before files had a digest."""
    with h5py.File(path, "w") as file:
        rankings._fill(file, tiny_ranking())
    return path


def test_a_ranking_without_a_digest_is_read(tmp_path):
    path = of_an_earlier_version(tmp_path / "old.h5")
    assert as_plain(read_ranking(path)) == as_plain(tiny_ranking())


def test_one_that_keeps_hdf5_busy_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(sealed, "_SECONDS", 1.5)
    path = of_an_earlier_version(tmp_path / "old.h5")
    os.mkfifo(tmp_path / "waits.h5")  # opening it ends as little as some loops do
    started = time.monotonic()
    assert not sealed._survives(tmp_path / "waits.h5", rankings.probe)
    assert time.monotonic() - started < 20
    monkeypatch.setattr(sealed, "_survives", lambda *_: False)
    assert "damaged" in refused(path)
