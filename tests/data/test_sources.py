"""DATA arguments: every kind of file and folder gives the same rows, and bad ones give one clear error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.data import sentences, tiny_image_folder, tiny_text_csv
from helpers.lazy import Lazy

from optin_cli.data.sources import DataSpec, open_split
from optin_cli.errors import InputError, UsageError

datasets = Lazy("datasets")

TABLE = {"text": sentences(7), "label": [0, 1, 1, 0, 1, 0, 0]}


def write_table(path: Path, table: dict[str, list] = TABLE) -> Path:
    """Write a table in the format that the suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = datasets.Dataset.from_dict(table)
    if path.suffix == ".parquet":
        rows.to_parquet(path)
    elif path.suffix == ".jsonl":
        rows.to_json(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows.to_list()))
    elif path.suffix == ".tsv":
        rows.to_csv(path, sep="\t")
    else:
        rows.to_csv(path)
    return path


def opened(path: Path | str, split: str = "train", **options) -> datasets.Dataset:
    return open_split(DataSpec(str(path), split, **options))


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(suffix, tmp_path):
    assert opened(write_table(tmp_path / f"data.{suffix}")).to_dict() == TABLE


@pytest.mark.parametrize("split", ["train", "validation", "my_split"])
def test_a_single_file_is_the_split_asked_for_whatever_its_name(split, tmp_path):
    assert len(opened(write_table(tmp_path / "data.csv"), split)) == 7


def test_words_that_look_like_missing_values_stay_words(tmp_path):
    words = ["None", "null", "NA", "nan", "N/A"]
    path = write_table(tmp_path / "data.csv", {"text": words})
    assert opened(path).to_dict() == {"text": words}


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_table(tmp_path / "data.csv")
    assert len(opened("~/data.csv")) == 7


@pytest.mark.parametrize("split", ["train[:10]", "train+test", ""])
def test_a_split_that_is_no_plain_name_is_a_usage_error(split, tmp_path):
    with pytest.raises(UsageError, match="samples for a part"):
        opened(write_table(tmp_path / "data.csv"), split)


# folders of tables


@pytest.mark.parametrize(
    ("split", "file"),
    [
        ("train", "train.csv"),
        ("validation", "dev.csv"),
        ("validation", "valid.csv"),
        ("dev", "validation.csv"),
        ("test", "test.csv"),
        ("mine", "mine.csv"),
    ],
)
def test_the_file_of_a_split_goes_by_its_name_or_a_usual_other_name(split, file, tmp_path):
    write_table(tmp_path / file)
    write_table(tmp_path / "other.csv", {"text": ["wrong"]})
    assert opened(tmp_path, split).to_dict() == TABLE


def test_the_parts_of_a_split_are_read_in_order(tmp_path):
    for part in range(2):
        write_table(tmp_path / "data" / f"train-0000{part}-of-00002.parquet", {"text": [f"part {part}"]})
    write_table(tmp_path / "data" / "test-00000-of-00001.parquet", {"text": ["test"]})
    assert opened(tmp_path)["text"][:] == ["part 0", "part 1"]


def test_a_folder_without_the_split_lists_the_ones_it_has(tmp_path):
    write_table(tmp_path / "train.csv")
    write_table(tmp_path / "test.csv")
    with pytest.raises(UsageError, match=r"no file for the split 'validation'(.|\n)*test, train"):
        opened(tmp_path, "validation")


# folders written by `datasets`


def test_a_saved_data_set_opens(tmp_path):
    datasets.Dataset.from_dict(TABLE).save_to_disk(str(tmp_path / "d"))
    assert opened(tmp_path / "d").to_dict() == TABLE


def test_a_saved_dictionary_of_splits_opens_by_split(tmp_path):
    other = {"text": ["held out"], "label": [1]}
    splits = {"train": datasets.Dataset.from_dict(TABLE), "validation": datasets.Dataset.from_dict(other)}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "d"))
    assert opened(tmp_path / "d").to_dict() == TABLE
    assert opened(tmp_path / "d", "validation").to_dict() == other
    with pytest.raises(UsageError, match=r"no split 'test'(.|\n)*train, validation"):
        opened(tmp_path / "d", "test")


def test_a_saved_data_set_without_its_rows_is_an_input_error(tmp_path):
    datasets.Dataset.from_dict(TABLE).save_to_disk(str(tmp_path / "d"))
    for path in (tmp_path / "d").glob("*.arrow"):
        path.unlink()
    with pytest.raises(InputError, match=str(tmp_path / "d")):
        opened(tmp_path / "d")


# image folders


def test_an_image_folder_has_images_and_the_classes_of_its_folders(tmp_path):
    rows = opened(tiny_image_folder(tmp_path / "d", n=6))
    assert rows.features["label"].names == ["cat", "dog"]
    assert sorted(rows["label"][:]) == [0, 0, 0, 1, 1, 1]
    assert {image.size for image in rows["image"]} == {(36, 40)}


@pytest.mark.parametrize("folder", ["validation", "val", "dev"])
def test_the_folder_of_a_split_goes_by_its_name_or_a_usual_other_name(folder, tmp_path):
    tiny_image_folder(tmp_path / "d" / "train", n=6)
    tiny_image_folder(tmp_path / "d" / folder, n=4)
    assert len(opened(tmp_path / "d", "train")) == 6
    rows = opened(tmp_path / "d", "validation")
    assert len(rows) == 4
    assert rows.features["label"].names == ["cat", "dog"]


def test_an_image_folder_with_other_splits_never_stands_in_for_a_missing_one(tmp_path):
    """Training images taken for validation images would make every number look good."""
    tiny_image_folder(tmp_path / "d" / "train", n=6)
    tiny_image_folder(tmp_path / "d" / "test", n=4)
    with pytest.raises(UsageError, match="validation"):
        opened(tmp_path / "d", "validation")


# the hub


@pytest.fixture
def hub(monkeypatch):
    """Stands in for `datasets.load_dataset`: keeps what it was asked."""
    asked = []

    def load_dataset(path, name=None, *, split):
        asked.append((path, name, split))
        return datasets.Dataset.from_dict(TABLE)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize(
    ("spec", "config", "asked"),
    [
        ("glue/sst2", None, ("nyu-mll/glue", "sst2", "validation")),
        ("glue", "mrpc", ("nyu-mll/glue", "mrpc", "validation")),
        ("imdb", None, ("stanfordnlp/imdb", None, "validation")),
        ("org/name", None, ("org/name", None, "validation")),
        ("org/name", "small", ("org/name", "small", "validation")),
    ],
)
def test_a_hub_data_set_is_asked_for_by_name_config_and_split(
    hub, tmp_path, monkeypatch, spec, config, asked
):
    monkeypatch.chdir(tmp_path)
    assert opened(spec, "validation", config=config).to_dict() == TABLE
    assert hub == [asked]


def test_a_hub_data_set_is_never_asked_for_a_slice(hub):
    with pytest.raises(UsageError):
        opened("glue/sst2", "train[:10]")
    assert hub == []


@pytest.mark.parametrize(
    "error",
    [
        lambda: datasets.exceptions.DatasetNotFoundError("no such data set\nmore lines"),
        lambda: ConnectionError("no connection"),
        lambda: ValueError("Unknown split 'x'. Should be one of ['train']."),
        lambda: ValueError("BuilderConfig 'x' not found."),
    ],
    ids=["not found", "offline", "split", "config"],
)
def test_a_hub_that_fails_is_one_input_error(monkeypatch, error):
    error = error()

    def fail(*_, **__):
        raise error

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(InputError, match="org/name") as caught:
        opened("org/name")
    assert str(error).splitlines()[0] in str(caught.value)
    assert "more lines" not in str(caught.value)


def test_a_hub_data_set_offline_is_an_input_error():
    """The real `datasets`, which conftest.py takes offline."""
    with pytest.raises(InputError, match="optin-tests/there-is-no-such-data"):
        opened("optin-tests/there-is-no-such-data")


# bad input


@pytest.mark.parametrize("spec", ["./nothing", "/nothing", "~/nothing", "nothing.csv", "some/deep/folder"])
def test_a_path_that_is_not_there_is_a_usage_error(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"no data at {spec}"):
        opened(spec)


def test_a_file_of_an_unknown_kind_lists_the_known_ones(tmp_path):
    (tmp_path / "data.docx").write_text("words")
    with pytest.raises(UsageError, match=r"no known kind(.|\n)*\.jsonl"):
        opened(tmp_path / "data.docx")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_an_empty_file_is_an_input_error(suffix, tmp_path):
    path = tmp_path / f"data.{suffix}"
    path.touch()
    with pytest.raises(InputError, match=f"{path} is empty"):
        opened(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data.parquet", b"PAR1 and then nothing of the kind"),
        ("data.jsonl", b'{"text": "good"}\n{"text": \n'),
        ("data.jsonl", b"\xff\xfe\x00\x01"),
        ("data.csv", b"text,label\n\xff\xfe\x00,1\n"),
        ("data.csv", b'text,label\na,1\nb,2,3,4\n"'),
    ],
    ids=["parquet", "broken json", "binary json", "binary csv", "ragged csv"],
)
def test_a_damaged_file_is_an_input_error_that_names_it(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{tmp_path / name} can't be read as data: ."):
        opened(tmp_path / name)


def test_a_truncated_parquet_file_is_an_input_error(tmp_path):
    path = write_table(tmp_path / "data.parquet")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=str(path)):
        opened(path)


def test_an_empty_folder_is_an_input_error(tmp_path):
    (tmp_path / "d").mkdir()
    with pytest.raises(InputError, match=str(tmp_path / "d")):
        opened(tmp_path / "d")


def test_a_folder_without_data_is_an_input_error(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "notes.txt").write_text("no data")
    with pytest.raises(InputError, match=str(tmp_path / "d")):
        opened(tmp_path / "d")


def test_files_of_one_split_in_several_formats_are_a_usage_error(tmp_path):
    write_table(tmp_path / "train.csv")
    write_table(tmp_path / "train.parquet")
    with pytest.raises(UsageError):
        opened(tmp_path)


def test_rows_follow_a_file_that_changed(tmp_path):
    """`datasets` keeps what it read once: a changed file of the same name must be read again."""
    path = tiny_text_csv(tmp_path, rows=5)
    first = opened(path).to_dict()
    shutil.copy(tiny_text_csv(tmp_path / "other", rows=5, seed=9), path)
    assert opened(path).to_dict() != first


@pytest.mark.parametrize("name", ["data[1].csv", "data[a-z]?.csv", "what*.csv"])
def test_the_name_of_a_file_is_no_pattern(tmp_path, name):
    (tmp_path / name).write_text("text,label\nfilm,1\n")
    (tmp_path / "data1.csv").write_text("text,label\nnot this,0\nnor this,0\n")
    assert open_split(DataSpec(str(tmp_path / name)))["text"] == ["film"]


def test_a_cache_that_can_not_be_made_is_not_a_fault_of_the_data(tmp_path, monkeypatch):
    import datasets

    (tmp_path / "file").write_text("x")
    (tmp_path / "new.csv").write_text("text,label\nnever seen before,1\n")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError) as caught:
        open_split(DataSpec(str(tmp_path / "new.csv")))
    assert "the cache of `datasets`" in str(caught.value) and "HF_DATASETS_CACHE" in str(caught.value)
    assert "suffix" not in str(caught.value)
