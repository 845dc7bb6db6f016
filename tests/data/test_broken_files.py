"""Broken images are left out, named and replaced; the same ones at every run, and few rows looked at."""

from __future__ import annotations

import logging
import re
from io import BytesIO

import numpy as np
import pytest
from helpers.data import tiny_image_folder
from helpers.lazy import Lazy
from helpers.runs import examples
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from optin_cli.data import broken_files as intact
from optin_cli.data.broken_files import leave_out_broken
from optin_cli.data.columns import Columns
from optin_cli.data.examples import Examples, sample
from optin_cli.data.images import decode
from optin_cli.data.kinds import Kind
from optin_cli.data.rows import draw
from optin_cli.data.sources import DataSpec
from optin_cli.errors import InputError

datasets = Lazy("datasets")

IMAGE = Columns(image="image")


def png(value: int = 0) -> bytes:
    content = BytesIO()
    Image.new("L", (2, 2), value % 256).save(content, "PNG")
    return content.getvalue()


class Rows:
    """A data set in memory, some of its images broken; keeps which rows were looked at."""

    def __init__(self, total: int, broken: set[int]) -> None:
        self.data = DataSpec("d")
        self.total = total
        self.broken = broken
        self.seen: list[int] = []

    def at(self, row_ids: list[int], image: str | None = None) -> datasets.Dataset:
        self.seen += row_ids
        return datasets.Dataset.from_dict({"image": [b"" if i in self.broken else png(i) for i in row_ids]})


@st.composite
def cases(draw_from):
    total = draw_from(st.integers(1, 80))
    broken = draw_from(st.sets(st.integers(0, total - 1), max_size=12))
    return total, broken, draw_from(st.integers(1, 90)), draw_from(st.integers(0, 5))


@examples(120)
@given(case=cases())
def test_what_is_left_is_sound_and_as_many_as_there_are(case):
    total, broken, samples, seed = case
    drawn = draw(total, samples, seed)
    rows, again = Rows(total, broken), Rows(total, broken)
    try:
        sound, found = leave_out_broken(rows, IMAGE, drawn, seed)
    except InputError as error:
        told = re.search(r"(\d+) of (\d+) images", str(error))
        assert told and int(told[1]) > 0.1 * int(told[2])
        assert int(told[1]) == len(broken & set(rows.seen))
        return
    assert len(found) <= 0.1 * len(rows.seen)
    assert sound == sorted(set(sound)) and not broken & set(sound)
    assert len(sound) == min(len(drawn), total - len(broken))
    assert set(drawn) - broken <= set(sound)
    assert found == sorted(broken & set(rows.seen))
    assert sorted(rows.seen) == sorted(sound + found)  # each row once, and none that is not used
    assert leave_out_broken(again, IMAGE, drawn, seed) == (sound, found)


def test_another_seed_replaces_by_other_rows():
    drawn = list(range(40))
    one, other = (leave_out_broken(Rows(1000, {3, 4}), IMAGE, drawn, seed)[0] for seed in (0, 1))
    assert one[:38] == other[:38]
    assert one[38:] != other[38:]


@pytest.mark.parametrize(("broken", "fails"), [(4, False), (5, True)])
def test_more_than_a_tenth_is_a_failure(broken, fails):
    rows = Rows(40, set(range(broken)))
    if fails:
        with pytest.raises(
            InputError, match=r"5 of 40 images of d \(train\) are broken, more than a tenth"
        ) as caught:
            leave_out_broken(rows, IMAGE, list(range(40)), 0)
        assert caught.value.exit_code == 1
    else:
        assert len(leave_out_broken(rows, IMAGE, list(range(40)), 0)[0]) == 36


def test_recorded_rows_are_used_exactly_or_not_at_all():
    with pytest.raises(InputError, match=r"d \(train\): row 7 \(it is empty\)"):
        leave_out_broken(Rows(100, {7}), IMAGE, list(range(50)), 0, exactly=True)


def folder_with_broken(folder, count: int = 30):
    """Images in a folder of which rows 4 and 11 are broken."""
    tiny_image_folder(folder, count, ["cat"])
    (folder / "cat" / "004.png").write_bytes(b"")
    cut = folder / "cat" / "011.png"
    cut.write_bytes(cut.read_bytes()[:700])
    return folder


def images(path, samples=None, **options) -> Examples:
    stream = options.pop("stream", False)
    return sample(
        DataSpec(str(path), stream=stream, workers=options.pop("workers", None)),
        "image",
        samples,
        0,
        **options,
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_the_warning_names_the_files(workers, tmp_path, caplog):
    path = folder_with_broken(tmp_path / "d")
    with caplog.at_level(logging.WARNING, logger="optin"):
        found = images(path, workers=workers)
    assert found.row_ids == [i for i in range(30) if i not in (4, 11)]
    assert (found.broken, found.total, len(found.rows)) == ([4, 11], 30, 28)
    [record] = caplog.records
    assert re.fullmatch(
        rf"2 of 30 images of {re.escape(str(path))} \(train\) are broken and left out: "
        r"row 4 \(004.png: it is empty\), row 11 \(011.png: .*truncated.*\)",
        record.getMessage(),
    )


def test_replacements_are_said_to_be_taken(tmp_path, caplog):
    found = images(folder_with_broken(tmp_path / "d"), 26)
    assert len(found.row_ids) == 26
    assert found.broken
    assert "others taken in their place" in caplog.text


def test_only_the_drawn_rows_are_decoded(tmp_path, monkeypatch):
    decoded = []

    def counting(stored):
        decoded.append(stored)
        return decode(stored)

    monkeypatch.setattr(intact, "kind_of", lambda _: Kind("image", "image", counting))
    images(tiny_image_folder(tmp_path / "d", 30), 5)
    assert len(decoded) == 5


def test_what_was_used_can_be_used_again(tmp_path):
    path = folder_with_broken(tmp_path / "d")
    found = images(path, 20)
    again = images(path, row_ids=found.row_ids)
    assert (again.row_ids, again.fingerprint, again.broken) == (found.row_ids, found.fingerprint, [])
    assert images(path, 20).row_ids == found.row_ids
    (path / "cat" / f"{found.row_ids[0]:03}.png").write_bytes(b"now broken too")
    with pytest.raises(InputError, match=f"row {found.row_ids[0]} "):
        images(path, row_ids=found.row_ids)


@pytest.mark.parametrize("samples", [20, 28, None])
def test_a_short_stream_leaves_out_what_a_folder_does(samples, tmp_path):
    path = folder_with_broken(tmp_path / "d")
    found, plain = images(path, samples, stream=True), images(path, samples)
    assert (found.row_ids, found.broken, found.fingerprint) == (
        plain.row_ids,
        plain.broken,
        plain.fingerprint,
    )


def test_a_long_stream_replaces_from_the_rows_it_has_read(tmp_path):
    broken = set(range(0, 600, 15))
    table = {"image": [None if i in broken else {"bytes": png(i), "path": None} for i in range(700)]}
    datasets.Dataset.from_dict(table, datasets.Features(image=datasets.Image())).to_parquet(
        tmp_path / "t.parquet"
    )
    found = images(tmp_path / "t.parquet", 30, stream=True)
    assert found.total == 600
    assert len(found.row_ids) == 30
    assert found.broken and set(found.broken) <= broken and not broken & set(found.row_ids)
    assert images(tmp_path / "t.parquet", row_ids=found.row_ids).fingerprint == found.fingerprint


@pytest.mark.parametrize("form", ["struct", "binary", "feature"])
@pytest.mark.parametrize("stream", [False, True])
def test_parquet_of_any_tool(form, stream, tmp_path):
    """Image columns without the note in the file by which `datasets` knows its own."""
    import pyarrow as pa
    from pyarrow import parquet

    contents = [png(40 * i) for i in range(6)]
    values = (
        contents if form == "binary" else [{"bytes": c, "path": f"{i}.png"} for i, c in enumerate(contents)]
    )
    if form == "feature":
        table = datasets.Dataset.from_dict({"picture": values, "label": [0, 1] * 3})
        table.cast_column("picture", datasets.Image()).to_parquet(tmp_path / "t.parquet")
    else:
        parquet.write_table(pa.table({"picture": values, "label": [0, 1] * 3}), tmp_path / "t.parquet")
    found = images(tmp_path / "t.parquet", stream=stream)
    assert (found.columns.image, found.columns.label) == ("picture", "label")
    shades = [int(np.asarray(decode(stored))[0, 0, 0]) for stored in found.rows["picture"]]
    assert shades == [0, 40, 80, 120, 160, 200]


def test_a_broken_image_of_a_column_that_is_not_used_matters_to_nobody(tmp_path):
    good = [{"bytes": png(i), "path": None} for i in range(4)]
    features = datasets.Features(image=datasets.Image(), mask=datasets.Image())
    datasets.Dataset.from_dict(
        {"image": good, "mask": [None, *good[1:3], {"bytes": b"", "path": None}]}, features
    ).to_parquet(tmp_path / "t.parquet")
    assert images(tmp_path / "t.parquet").row_ids == [0, 1, 2, 3]
