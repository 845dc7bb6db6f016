"""Rankings that are damaged, incomplete or of another kind are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers.artefacts import tiny_ranking
from helpers.rankings import ARRAYS, as_plain, refused, resealed

from optin_cli.artefacts.ranking import (
    Ranking,
    read_ranking,
    write_ranking,
)
from optin_cli.errors import ArtefactError, UsageError


def test_a_missing_ranking_says_how_to_make_one(tmp_path):
    with pytest.raises(UsageError, match="optin score"):
        read_ranking(tmp_path / "nothing.h5")


def test_a_folder_is_no_ranking(tmp_path):
    with pytest.raises(UsageError, match=str(tmp_path)):
        read_ranking(tmp_path)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "an empty file"),
        (b"{}", "a JSON file"),
        (bytes(5000), "a file of zeros"),
        (b"text,label\nfilm,1\n", "a text file"),
        (b"\x80\x04\x95 and so on", "a pickle"),
        (b"PK\x03\x04", "a zip archive"),
        (b'\x28\0\0\0\0\0\0\0{"w":{}}', "a safetensors file"),
        (bytes(range(256)), "a binary file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_of_another_kind_is_called_by_its_kind(tmp_path, content, kind):
    (tmp_path / "r.h5").write_bytes(content)
    message = refused(tmp_path / "r.h5")
    assert f"is {kind}" in message and "not a ranking" in message and "optin score" in message


def test_hdf5_that_ends_after_its_first_bytes_is_refused(tmp_path):
    (tmp_path / "r.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    assert "score again" in refused(tmp_path / "r.h5")


def test_an_hdf5_file_of_something_else_is_refused(tmp_path):
    with h5py.File(tmp_path / "r.h5", "w") as file:
        file["weights"] = np.zeros(3)
    assert "not a ranking" in refused(tmp_path / "r.h5")


def test_a_ranking_cut_anywhere_is_refused(tmp_path):
    good = tmp_path / "good.h5"
    write_ranking(good, tiny_ranking(blocks=1))
    content = good.read_bytes()
    cut = tmp_path / "cut.h5"
    for length in (*range(0, len(content), 7), *range(len(content) - 50, len(content))):
        cut.write_bytes(content[:length])
        with pytest.raises((ArtefactError, UsageError)):
            read_ranking(cut)


def test_a_flipped_bit_in_any_number_is_noticed(path):
    """Scores, their parts and row ids: the digest covers them all."""
    ranking, content = read_ranking(path), path.read_bytes()
    stored = [getattr(site, name).tobytes() for site in ranking.sites for name in ARRAYS]
    stored.append(np.asarray(ranking.row_ids, dtype=np.int64).tobytes())
    for data in stored:
        assert content.count(data) >= 1
        for offset in (0, len(data) // 2, len(data) - 1):
            damaged = bytearray(content)
            damaged[content.index(data) + offset] ^= 1
            path.write_bytes(damaged)
            assert "damaged" in refused(path)


@pytest.mark.parametrize("step", [211, pytest.param(23, marks=pytest.mark.slow)])
def test_a_flipped_byte_anywhere_is_refused_or_changes_nothing(path, step):
    content = path.read_bytes()
    expected = without_circumstances(read_ranking(path))
    for position in range(0, len(content), step):
        damaged = bytearray(content)
        damaged[position] ^= 0x11
        path.write_bytes(damaged)
        try:
            read = read_ranking(path)
        except (ArtefactError, UsageError):
            continue
        assert without_circumstances(read) == expected, f"byte {position}"


def without_circumstances(ranking: Ranking) -> dict:
    """All that a selection depends on; when, where and how fast may be wrong in a damaged file."""
    plain = as_plain(ranking)
    return {k: v for k, v in plain.items() if k not in ("created", "seconds", "device", "dtype", "versions")}


def change(path: Path, edit: Callable[[h5py.File], None]) -> Path:
    with h5py.File(path, "r+") as file:
        edit(file)
    return resealed(path)


def test_an_unfinished_ranking_is_refused(path):
    def unfinished(file: h5py.File) -> None:
        file.attrs["complete"] = False

    assert "incomplete" in refused(change(path, unfinished))


def test_a_ranking_without_the_mark_of_completion_is_refused(path):
    assert "incomplete" in refused(change(path, lambda file: file.attrs.pop("complete")))


def test_a_ranking_of_a_newer_schema_asks_for_an_update(path):
    def newer(file: h5py.File) -> None:
        file.attrs["schema_version"] = 99

    message = refused(change(path, newer))
    assert "schema version 99" in message and "update optin" in message


ROOT = [
    "schema_version",
    "checksum",
    "model",
    "data",
    "settings",
    "dense",
    "versions",
    "method",
    "tokens",
    "device",
]


@pytest.mark.parametrize("name", ROOT)
def test_a_missing_attribute_is_refused(path, name):
    refused(change(path, lambda file: file.attrs.pop(name)))


@pytest.mark.parametrize("name", ["kind", "block", "units", "width", "macs_per_token", "columns"])
def test_a_missing_attribute_of_a_site_is_refused(path, name):
    refused(change(path, lambda file: file["sites/blocks.0.heads"].attrs.pop(name)))


@pytest.mark.parametrize("name", ["sites", "row_ids", *(f"sites/blocks.1.neurons/{a}" for a in ARRAYS)])
def test_missing_data_is_refused(path, name):
    def remove(file: h5py.File) -> None:
        del file[name]

    refused(change(path, remove))


def test_a_missing_site_is_refused(path):
    def remove(file: h5py.File) -> None:
        del file["sites/blocks.1.neurons"]

    assert "damaged" in refused(change(path, remove))


def replaced(name: str, value: np.ndarray) -> Callable[[h5py.File], None]:
    def edit(file: h5py.File) -> None:
        del file[name]
        file[name] = value

    return edit


def consistent(path: Path, site: str, name: str, value: np.ndarray) -> Path:
    """A ranking whose digest fits, as a faulty program might write it: one array is `value`."""
    ranking = read_ranking(path)
    setattr(next(s for s in ranking.sites if s.name == site), name, value)
    write_ranking(path, ranking)
    return path


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("units", [3, 5])
def test_a_number_of_scores_that_is_not_the_number_of_units_is_refused(path, name, units):
    shape = (units, 3) if name == "trajectory" else (units,)
    assert "blocks.0.heads" in refused(consistent(path, "blocks.0.heads", name, np.ones(shape)))


@pytest.mark.parametrize("columns", [2, 4])
def test_a_number_of_columns_that_is_not_that_of_the_features_is_refused(path, columns):
    value = np.ones((4, columns))
    assert "blocks.0.heads" in refused(consistent(path, "blocks.0.heads", "trajectory", value))


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused(path, name, bad):
    shape = {"trajectory": (4, 3), "by_batch": (2, 4, 2)}.get(name, (4,))
    value = np.ones(shape)
    value[1] = bad
    message = refused(consistent(path, "blocks.0.heads", name, value))
    assert "blocks.0.heads" in message and "finite" in message


@pytest.mark.parametrize(
    "edit",
    [
        replaced("sites", np.zeros(3)),
        replaced("sites/blocks.0.heads", np.zeros(4)),
        replaced("sites/blocks.0.heads/score", np.asarray(1.0)),
        replaced("sites/blocks.0.heads/score", np.asarray([b"a"] * 4)),
        replaced("row_ids", np.asarray(1)),
        lambda file: file.attrs.modify("model", "no JSON"),
        lambda file: file.attrs.modify("model", "[]"),
        lambda file: file.attrs.create("schema_version", "first"),
        lambda file: file.attrs.create("tokens", h5py.Empty("f8")),
        lambda file: file["sites/blocks.0.heads"].attrs.create("units", h5py.Empty("i8")),
        lambda file: file["sites/blocks.0.heads"].attrs.create("columns", "words"),
    ],
    ids=["sites", "site", "score", "text", "rows", "json", "list", "version", "empty", "units", "columns"],
)
def test_data_of_another_kind_than_expected_is_refused(path, edit):
    refused(change(path, edit))
