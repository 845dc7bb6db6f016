"""Masks on disk: readable JSON that is checked before anything is cut."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.artefacts import ASKED, CALIBRATION, OBJECTIVE, REACHED, kept_of, tiny_ranking
from helpers.runs import examples
from hypothesis import given
from hypothesis import strategies as st

from optin_cli.artefacts.mask import Mask, mask_to_json, read_mask, write_mask
from optin_cli.artefacts.ranking import write_ranking
from optin_cli.errors import ArtefactError, UsageError


def a_mask(**changes: Any) -> Mask:
    mask = Mask(
        model_digest="m" * 64,
        ranking_digest="r" * 64,
        family="bert",
        budget=dict(ASKED),
        reached=dict(REACHED),
        objective=dict(OBJECTIVE),
        calibration=dict(CALIBRATION),
        units={"blocks.0.heads": 4, "blocks.0.neurons": 6},
        keep={"blocks.0.heads": [0, 3], "blocks.0.neurons": []},
        summary={"blocks.0.heads": "2/4", "blocks.0.neurons": "0/6"},
    )
    return dataclasses.replace(mask, **changes)


@pytest.fixture
def path(tmp_path) -> Path:
    """A good mask on disk."""
    write_mask(tmp_path / "m.mask.json", a_mask())
    return tmp_path / "m.mask.json"


def change(path: Path, edit: Callable[[dict], Any]) -> Path:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))
    return path


def keeping(path: Path, indices: Any) -> Path:
    return change(path, lambda data: data["keep"].update({"blocks.0.heads": indices}))


def refused(path: Path) -> str:
    with pytest.raises(ArtefactError) as caught:
        read_mask(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


# round trip


@st.composite
def masks(draw) -> Mask:
    names = st.from_regex(r"blocks\.[0-9]{1,2}\.(heads|neurons)", fullmatch=True)
    units = draw(st.dictionaries(names, st.integers(0, 12), max_size=4))
    keep = {name: draw(kept_of(count)) for name, count in units.items()}
    numbers = st.dictionaries(st.text(max_size=5), st.floats(0, 1e12), max_size=3)
    return a_mask(
        model_digest=draw(st.text(max_size=8)),
        family=draw(st.text(max_size=8)),
        budget={**draw(numbers), **ASKED},
        reached={**draw(numbers), **REACHED},
        objective={**draw(numbers), **OBJECTIVE},
        calibration={**CALIBRATION, "row_ids": draw(st.lists(st.integers(0, 99), max_size=4))},
        units=units,
        keep=keep,
        summary=draw(st.dictionaries(names, st.text(max_size=5), max_size=2)),
    )


@examples(80)
@given(mask=masks())
def test_a_written_mask_reads_back_the_same(tmp_path_factory, mask):
    path = tmp_path_factory.mktemp("mask") / "m.json"
    write_mask(path, mask)
    assert read_mask(path) == mask
    assert read_mask(path).digest == mask.digest


@examples(40)
@given(mask=masks())
def test_the_same_mask_gives_the_same_text(mask):
    assert mask_to_json(mask) == mask_to_json(dataclasses.replace(mask))


@pytest.mark.parametrize("field", dataclasses.fields(Mask), ids=lambda field: field.name)
def test_the_digest_covers_every_field(field):
    other = {"x": [0]} if field.type.startswith("dict") else "x"
    assert a_mask(**{field.name: other}).digest != a_mask().digest


def test_the_kept_units_of_a_site_stand_on_one_line(path):
    lines = [line.strip() for line in path.read_text().splitlines()]
    assert '"blocks.0.heads": [0, 3],' in lines


def test_a_mask_without_its_summary_is_whole(path):
    assert read_mask(change(path, lambda data: data.pop("summary"))) == a_mask(summary={})


def test_keys_of_a_later_program_are_passed_over(path):
    assert read_mask(change(path, lambda data: data.update(colour="red"))) == a_mask()


@pytest.mark.parametrize("version", [1, 2])
def test_masks_of_earlier_schemas_still_read(path, version):
    def older(data):
        data["schema_version"] = version
        del data["merges"], data["ranks"]

    assert read_mask(change(path, older)) == a_mask()


def test_a_schedule_of_merges_is_kept_and_counts(tmp_path):
    mask = a_mask(merges=[3, 0, 2])
    write_mask(tmp_path / "m.mask.json", mask)
    assert read_mask(tmp_path / "m.mask.json").merges == [3, 0, 2]
    assert len({mask.digest, a_mask().digest, a_mask(merges=[3, 0, 1]).digest}) == 3


@pytest.mark.parametrize("count", [-1, 1.5, "2", True])
def test_counts_that_are_none_are_refused(path, count):
    assert "tokens to merge" in refused(change(path, lambda data: data.update(merges=[0, count])))


def test_a_failing_write_leaves_nothing(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="is a folder, not a name for a file"):
        write_mask(tmp_path / "out", a_mask())
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# indices


@pytest.mark.parametrize(
    ("indices", "said"),
    [
        ([0, 4], "index 4 out of range (0..3)"),
        ([-1, 2], "index -1 out of range (0..3)"),
        ([1, 1, 2], "index 1 twice"),
        ([2, 1, 2], "index 2 twice"),
        ([2, 1], "indices are not ascending"),
        ([0, 1.5], "indices must be whole numbers"),
        ([0, 1.0], "indices must be whole numbers"),
        ([0, "1"], "indices must be whole numbers"),
        ([0, None], "indices must be whole numbers"),
        ([False, True], "indices must be whole numbers"),
        ([[0]], "indices must be whole numbers"),
        ("01", "indices must be whole numbers"),
        ({"0": 1}, "indices must be whole numbers"),
        (None, "indices must be whole numbers"),
        (2, "indices must be whole numbers"),
    ],
)
def test_bad_indices_are_refused_naming_the_site_and_what_is_wrong(path, indices, said):
    assert f"blocks.0.heads: {said}" in refused(keeping(path, indices))


def test_every_bad_site_is_listed(path):
    keeping(path, [9])
    message = refused(change(path, lambda data: data["keep"].update({"blocks.0.neurons": [1, 0]})))
    assert "blocks.0.heads: index 9" in message
    assert "blocks.0.neurons: indices are not ascending" in message


@examples(100)
@given(indices=st.lists(st.integers(-2, 6), max_size=5))
def test_just_the_ascending_indices_in_range_are_accepted(tmp_path_factory, indices):
    path = tmp_path_factory.mktemp("mask") / "m.json"
    write_mask(path, a_mask(keep={"blocks.0.heads": indices, "blocks.0.neurons": []}))
    if indices == sorted(set(indices) & set(range(4))):
        assert read_mask(path).keep["blocks.0.heads"] == indices
    else:
        refused(path)


def test_a_site_that_is_kept_but_has_no_units_is_refused(path):
    message = refused(change(path, lambda data: data["keep"].update({"blocks.7.heads": []})))
    assert "different sites (blocks.7.heads)" in message


def test_a_site_that_has_units_but_is_not_kept_is_refused(path):
    message = refused(change(path, lambda data: data["keep"].pop("blocks.0.neurons")))
    assert "different sites (blocks.0.neurons)" in message


# other damage


@pytest.mark.parametrize("field", ["keep", "units"])
@pytest.mark.parametrize("value", [[], None, 3, "words"])
def test_keep_and_units_must_be_objects(path, field, value):
    assert f"{field} must be a dict" in refused(change(path, lambda data: data.update({field: value})))


@pytest.mark.parametrize("count", ["4", None, -1, 1.5, [4]])
def test_numbers_of_units_must_be_whole_numbers(path, count):
    message = refused(change(path, lambda data: data["units"].update({"blocks.0.heads": count})))
    assert "blocks.0.heads" in message


@pytest.mark.parametrize(
    "field",
    ["model_digest", "ranking_digest", "family", "budget", "reached", "objective", "calibration", "summary"],
)
def test_a_field_of_another_kind_is_refused_by_name(path, field):
    assert field in refused(change(path, lambda data: data.update({field: [1, 2]})))


@pytest.mark.parametrize(
    "field", [f.name for f in dataclasses.fields(Mask) if f.name not in ("summary", "merges", "ranks")]
)
def test_a_missing_field_is_named(path, field):
    assert f"{field} is missing" in refused(change(path, lambda data: data.pop(field)))


def test_a_missing_mask_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        read_mask(tmp_path / "nothing.json")


def test_a_folder_is_no_mask(tmp_path):
    with pytest.raises(UsageError, match=str(tmp_path)):
        read_mask(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "keep everything"])
def test_a_file_that_is_no_json_object_is_refused(tmp_path, content):
    (tmp_path / "m.json").write_text(content)
    refused(tmp_path / "m.json")


def test_a_ranking_is_no_mask(tmp_path):
    write_ranking(tmp_path / "r.h5", tiny_ranking())
    refused(tmp_path / "r.h5")


def test_json_of_something_else_says_what_writes_masks(tmp_path):
    (tmp_path / "m.json").write_text('{"model_type": "bert"}')
    assert "optin select" in refused(tmp_path / "m.json")


@pytest.mark.parametrize("version", [5, 99, "1", None, 1.0])
def test_a_schema_that_is_newer_or_no_number_is_refused(path, version):
    message = refused(change(path, lambda data: data.update(schema_version=version)))
    assert f"schema version {version}" in message and "update optin" in message


def test_a_mask_cut_at_any_byte_is_refused(path):
    content = path.read_bytes()
    for length in range(len(content) - 2):
        path.write_bytes(content[:length])
        refused(path)


@pytest.mark.parametrize("part", ["budget", "reached", "objective", "calibration"])
def test_a_part_without_its_entries_is_refused_by_name(path, part):
    assert f"{part}." in refused(change(path, lambda data: data.update({part: {}})))


@pytest.mark.parametrize(
    ("part", "entry", "value"),
    [
        ("budget", "tokens", "many"),
        ("budget", "protect", [1]),
        ("reached", "macs", None),
        ("objective", "optimal", "yes"),
        ("objective", "interactions", {"moved": 1}),
        ("calibration", "rows", 1.5),
        ("calibration", "row_ids", ["a"]),
    ],
)
def test_an_entry_of_another_kind_is_refused_by_name(path, part, entry, value):
    message = refused(change(path, lambda data: data[part].update({entry: value})))
    assert f"{part}.{entry}" in message


def test_a_mask_that_used_a_latency_table_has_its_times(path):
    table = {
        "device": "cpu", "processor": "", "threads": 1, "dtype": "float32", "batch_size": 1, "size": 8, "model": "m",
        "of": "", "digest": "",
    }  # fmt: skip
    assert "reached.latency_ms is missing" in refused(
        change(path, lambda data: data["budget"].update(latency_table=table))
    )


def test_many_repeated_indices_are_found_in_one_pass(path):
    """Counting each of them again took minutes."""
    count = 200_000
    indices = [*range(count), count - 1]

    def many(data: dict) -> None:
        data["units"]["blocks.0.heads"] = count
        data["keep"]["blocks.0.heads"] = indices

    assert f"index {count - 1} twice" in refused(change(path, many))
