"""Sampling rows: the same seed, the same rows, the same fingerprint, whatever file they come from."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from helpers.data import sentences, tiny_image_folder, tiny_text_csv
from helpers.lazy import Lazy
from helpers.runs import examples
from hypothesis import given
from hypothesis import strategies as st

from optin_cli.data.examples import Examples, sample
from optin_cli.data.readers import SIDES
from optin_cli.data.rows import draw
from optin_cli.data.sources import DataSpec, open_split
from optin_cli.errors import InputError, UsageError

datasets = Lazy("datasets")


@pytest.fixture(scope="module")
def csv(tmp_path_factory) -> str:
    return str(tiny_text_csv(tmp_path_factory.mktemp("data"), rows=60))


def sampled(path: Path | str, samples: int | None = None, seed: int = 0, **options) -> Examples:
    return sample(DataSpec(str(path)), "text", samples, seed, **options)


def content(drawn: Examples) -> tuple:
    return drawn.row_ids, drawn.fingerprint, drawn.rows.to_list()


# which rows


def test_the_same_seed_gives_the_same_rows(csv):
    assert content(sampled(csv, 10, seed=3)) == content(sampled(csv, 10, seed=3))


def test_another_seed_gives_other_rows(csv):
    assert sampled(csv, 10, seed=3).row_ids != sampled(csv, 10, seed=4).row_ids


def test_sampled_rows_are_those_of_their_row_ids(csv):
    drawn = sampled(csv, 10)
    split = open_split(DataSpec(csv))
    assert drawn.rows.to_list() == [split[i] for i in drawn.row_ids]
    assert drawn.total == len(split) == 60


@examples(200)
@given(total=st.integers(1, 300), samples=st.integers(1, 400), seed=st.integers(0, 2**31))
def test_drawn_rows_ascend_without_repeats_and_are_as_many_as_asked_or_there_are(total, samples, seed):
    row_ids = draw(total, samples, seed)
    assert row_ids == sorted(set(row_ids))
    assert set(row_ids) <= set(range(total))
    assert len(row_ids) == min(samples, total)


def test_every_row_is_drawn_about_equally_often():
    """Each of 20 rows is in a draw of 5 with chance 1/4: 250 of 1000 times, give or take five deviations."""
    counts = [0] * 20
    for seed in range(1000):
        for row in draw(20, 5, seed):
            counts[row] += 1
    assert all(180 < count < 320 for count in counts)


def test_without_a_number_all_rows_are_taken(csv, caplog):
    assert sampled(csv, None).row_ids == list(range(60))
    assert caplog.records == []


def test_fewer_rows_than_asked_for_are_all_taken_with_a_warning(csv, caplog):
    with caplog.at_level(logging.WARNING, logger="optin"):
        assert sampled(csv, 100).row_ids == list(range(60))
    [record] = caplog.records
    assert "60 rows" in record.getMessage() and "100" in record.getMessage()


def test_as_many_rows_as_asked_for_are_no_reason_to_warn(csv, caplog):
    assert len(sampled(csv, 60).row_ids) == 60
    assert caplog.records == []


@pytest.mark.parametrize(("samples", "rows"), [(10, 5), (11, 6), (1, 1)])
def test_two_columns_apart_need_half_the_rows(csv, samples, rows):
    assert len(sampled(csv, samples, reader=SIDES).row_ids) == rows
    assert len(sampled(csv, samples).row_ids) == samples


def test_two_columns_apart_have_enough_examples_in_half_the_rows(csv, caplog):
    assert len(sampled(csv, 120, reader=SIDES).row_ids) == 60
    assert caplog.records == []


def test_one_column_apart_is_one_example_a_row(tmp_path):
    path = tiny_text_csv(tmp_path, rows=20, pairs=False)
    assert len(sampled(path, 10, reader=SIDES).row_ids) == 10


def test_recorded_rows_can_be_taken_again(csv):
    drawn = sampled(csv, 12, seed=7)
    assert content(sampled(csv, None, row_ids=drawn.row_ids)) == content(drawn)


def test_the_description_finds_the_same_examples_again(csv):
    drawn = sample(DataSpec(csv, text=("sentence2",), label="label"), "text", 12, 7)
    facts = drawn.describe()
    data = DataSpec(
        facts["spec"],
        facts["split"],
        facts["config"],
        tuple(facts["text"]),
        facts["label"],
        facts["image"],
    )
    again = sample(data, "text", None, 0, row_ids=drawn.row_ids)
    assert again.fingerprint == drawn.fingerprint == facts["fingerprint"]


def test_a_recorded_row_that_is_gone_is_an_input_error(tmp_path):
    path = tiny_text_csv(tmp_path, rows=20)
    with pytest.raises(InputError, match="20 rows now; row 20 is gone"):
        sampled(path, None, row_ids=[3, 20])


# bad input


@pytest.mark.parametrize("samples", [0, -1])
def test_no_examples_are_a_usage_error(csv, samples):
    with pytest.raises(UsageError, match=f"samples={samples}"):
        sampled(csv, samples)


@pytest.mark.parametrize("suffix", ["csv", "parquet", "saved"])
def test_a_split_without_rows_is_an_input_error(suffix, tmp_path):
    path = tmp_path / f"data.{suffix}"
    nothing = datasets.Dataset.from_dict({"text": [], "label": []})
    if suffix == "csv":
        path.write_text("text,label\n")  # some versions of `datasets` write no header without a row
    else:
        {"parquet": nothing.to_parquet, "saved": nothing.save_to_disk}[suffix](str(path))
    with pytest.raises(InputError, match=rf"{path} \(train\) is empty"):
        sampled(path, 10)


def test_data_without_text_is_an_input_error(tmp_path):
    path = tmp_path / "data.csv"
    datasets.Dataset.from_dict({"height": [1, 2], "width": [3.5, 4.0]}).to_csv(path)
    with pytest.raises(InputError, match="no text column; it has height, width"):
        sampled(path, 1)


# fingerprints


def saved(table: datasets.Dataset, path: Path) -> Path:
    if path.suffix == ".csv":
        table.to_csv(path)
    elif path.suffix == ".jsonl":
        table.to_json(path)
    elif path.suffix == ".parquet":
        table.to_parquet(path)
    else:
        table.save_to_disk(str(path))
    return path


@pytest.mark.parametrize("labels", ["class", "name", "score", None])
def test_the_fingerprint_does_not_depend_on_the_file_format(labels, tmp_path):
    table = open_split(DataSpec(str(tiny_text_csv(tmp_path, rows=15, labels=labels))))
    paths = [saved(table, tmp_path / name) for name in ("a.csv", "b.jsonl", "c.parquet", "d")]
    assert len({sampled(path, 10).fingerprint for path in paths}) == 1


TABLE = {"text": sentences(8), "label": [0, 1] * 4, "idx": list(range(8))}


def fingerprint_of(folder: Path, table: dict[str, list], **options) -> str:
    path = folder / f"{len(list(folder.iterdir()))}.parquet"
    datasets.Dataset.from_dict(table).to_parquet(path)
    return sampled(path, **options).fingerprint


@pytest.mark.parametrize("column", ["text", "label"])
def test_the_fingerprint_changes_with_any_text_or_label(tmp_path, column):
    changed = {**TABLE, column: [*TABLE[column][:-1], TABLE[column][0] if column == "label" else "other"]}
    assert changed != TABLE
    assert fingerprint_of(tmp_path, changed) != fingerprint_of(tmp_path, TABLE)


def test_the_fingerprint_ignores_columns_that_are_not_used(tmp_path):
    assert fingerprint_of(tmp_path, {**TABLE, "idx": [0] * 8}) == fingerprint_of(tmp_path, TABLE)


def test_the_fingerprint_changes_with_the_order_and_choice_of_rows(tmp_path):
    turned = {name: values[::-1] for name, values in TABLE.items()}
    whole = fingerprint_of(tmp_path, TABLE)
    assert fingerprint_of(tmp_path, turned) != whole
    assert fingerprint_of(tmp_path, TABLE, row_ids=[0, 1, 2]) != whole


def test_the_fingerprint_is_of_the_sampled_rows_alone(tmp_path):
    """A file that grew still holds the rows a ranking was made on."""
    longer = {name: [*values, *values] for name, values in TABLE.items()}
    ids = [1, 4, 6]
    assert fingerprint_of(tmp_path, longer, row_ids=ids) == fingerprint_of(tmp_path, TABLE, row_ids=ids)


def test_swapped_text_columns_have_another_fingerprint(csv):
    one, other = (
        sample(DataSpec(csv, text=text), "text", 5, 0).fingerprint
        for text in (("sentence1", "sentence2"), ("sentence2", "sentence1"))
    )
    assert one != other


def sampled_images(path: Path, row_ids: list[int] | None = None) -> Examples:
    return sample(DataSpec(str(path)), "image", None, 0, row_ids=row_ids)


def test_the_fingerprint_of_images_is_of_their_bytes_wherever_they_are(tmp_path):
    folder = tiny_image_folder(tmp_path / "d", n=4)
    rows = open_split(DataSpec(str(folder)))
    embedded = rows.cast_column("image", datasets.Image(decode=False)).map(
        lambda row: {"image": {"bytes": Path(row["image"]["path"]).read_bytes(), "path": None}}
    )
    embedded.cast_column("image", datasets.Image()).to_parquet(tmp_path / "embedded.parquet")
    fingerprint = sampled_images(folder).fingerprint
    assert sampled_images(tmp_path / "embedded.parquet").fingerprint == fingerprint
    assert sampled_images(tiny_image_folder(tmp_path / "e", n=4)).fingerprint == fingerprint


def test_the_fingerprint_changes_with_one_image(tmp_path):
    folder = tiny_image_folder(tmp_path / "d", n=4)
    changed = tiny_image_folder(tmp_path / "e", n=4)
    (changed / "cat" / "000.png").write_bytes((folder / "cat" / "002.png").read_bytes())
    assert sampled_images(folder).fingerprint != sampled_images(changed).fingerprint
