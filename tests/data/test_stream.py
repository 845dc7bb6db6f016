"""Samples drawn from a stream: the first rows alone are read, and the same rows can be read again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.cli import run
from helpers.data import sentences, tiny_image_folder, tiny_text_csv
from helpers.lazy import Lazy
from helpers.models import saved_model

from optin_cli.artefacts.mask import read_mask
from optin_cli.artefacts.ranking import read_ranking
from optin_cli.compensation.plan import own_data
from optin_cli.data.examples import sample
from optin_cli.data.images import decode
from optin_cli.data.readers import SIDES
from optin_cli.data.sources import DataSpec, open_stream
from optin_cli.errors import InputError, UsageError

datasets = Lazy("datasets")


def table(rows: int, path: Path) -> Path:
    """A file of texts and labels; its suffix says which kind."""
    data = datasets.Dataset.from_dict({"text": sentences(rows), "label": [i % 3 for i in range(rows)]})
    write = {".csv": data.to_csv, ".jsonl": data.to_json, ".parquet": data.to_parquet}[path.suffix]
    write(str(path))
    return path


def streamed(path, samples, seed=0, modality="text", stream=True, **given):
    given.setdefault("row_ids", None)
    return sample(DataSpec(str(path), stream=stream), modality, samples, seed, **given)


def content(found) -> list[dict]:
    return [dict(row) for row in found.rows]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_positions_are_those_of_the_file(suffix, tmp_path):
    path = table(500, tmp_path / f"t.{suffix}")
    found = streamed(path, 10)
    assert len(set(found.row_ids)) == 10
    assert found.row_ids == sorted(found.row_ids)
    assert max(found.row_ids) < found.total == 200  # 20 rows are read for each one drawn
    whole = streamed(path, None, stream=False)
    assert content(found) == [dict(whole.rows[i]) for i in found.row_ids]
    again = streamed(path, None, row_ids=found.row_ids)
    assert (again.fingerprint, content(again)) == (found.fingerprint, content(found))
    assert streamed(path, None, row_ids=found.row_ids, stream=False).fingerprint == found.fingerprint


def test_the_seed_draws(tmp_path):
    path = table(300, tmp_path / "t.csv")
    assert streamed(path, 10, seed=1).row_ids != streamed(path, 10).row_ids == streamed(path, 10).row_ids


def test_a_short_stream_gives_what_a_file_gives(tmp_path, caplog):
    path = table(30, tmp_path / "t.csv")
    for samples in (10, 40):
        found, plain = streamed(path, samples), streamed(path, samples, stream=False)
        assert (found.row_ids, found.total) == (plain.row_ids, plain.total)
        assert found.fingerprint == plain.fingerprint
    assert caplog.text.count("30 rows, fewer than the 40 asked for") == 2
    assert len(streamed(path, None).row_ids) == 30


def test_nothing_behind_the_window_is_read(monkeypatch):
    """A hub data set without an end."""
    asked, read = [], []

    def endless():
        for i in range(10**9):
            read.append(i)
            yield {"text": f"text {i}", "label": i % 2}

    def load_dataset(path, name=None, **options):
        asked.append((path, name, options))
        return datasets.IterableDataset.from_generator(endless)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    found = sample(DataSpec("glue/sst2", stream=True), "text", 8, 0)
    assert asked == [("nyu-mll/glue", "sst2", {"split": "train", "streaming": True})]
    assert max(read) < 20 * 8 + 100
    assert content(found) == [{"text": f"text {i}", "label": i % 2} for i in found.row_ids]
    read.clear()
    again = sample(DataSpec("glue/sst2", stream=True), "text", None, 0, row_ids=found.row_ids)
    assert again.fingerprint == found.fingerprint


def test_two_text_columns_that_stay_apart_take_half_the_rows(tmp_path):
    found = streamed(tiny_text_csv(tmp_path), 20, reader=SIDES)
    assert len(found.row_ids) == 10


def test_images_are_opened_only_when_used(tmp_path):
    folder = tiny_image_folder(tmp_path / "images", n=12)
    found = streamed(folder, 4, modality="image")
    plain = streamed(folder, 4, modality="image", stream=False)
    assert (found.row_ids, found.fingerprint) == (plain.row_ids, plain.fingerprint)
    for one, two in zip(found.rows, plain.rows, strict=True):
        np.testing.assert_array_equal(np.asarray(decode(one["image"])), np.asarray(decode(two["image"])))
        assert one["label"] == two["label"]
    assert isinstance(next(iter(open_stream(found.data)))["image"], dict)  # neither decoded nor read


@pytest.mark.parametrize("spec", ["builtin:docs", "saved"])
def test_data_that_is_there_anyway_streams_too(spec, tmp_path):
    if spec == "saved":
        datasets.Dataset.from_dict({"text": sentences(50)}).save_to_disk(str(tmp_path / "saved"))
        spec = str(tmp_path / "saved")
    found, plain = streamed(spec, 5), streamed(spec, 5, stream=False)
    whole = streamed(spec, None, stream=False)
    assert content(found) == [dict(whole.rows[i]) for i in found.row_ids]
    assert plain.total == len(whole.row_ids)


def test_what_a_stream_can_not_give_is_one_error(tmp_path):
    path = table(30, tmp_path / "t.csv")
    with pytest.raises(InputError, match="30 rows now; row 31 is gone"):
        streamed(path, None, row_ids=[1, 31])
    (tmp_path / "empty.csv").write_text("text,label\n")
    with pytest.raises(InputError, match="is empty"):
        streamed(tmp_path / "empty.csv", 4)
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(InputError, match="can't be read as data"):
        streamed(tmp_path / "broken.jsonl", 4)
    with pytest.raises(UsageError, match="no data at"):
        streamed(tmp_path / "absent.csv", 4)
    with pytest.raises(InputError, match="no image column"):
        streamed(path, 4, modality="image")


def test_a_ranking_of_a_stream_leads_to_a_compensated_model(tmp_path):
    """`apply` reads its rows the way `score` did."""
    csv, model = table(200, tmp_path / "t.csv"), saved_model("bert")
    fast = ["--samples", "8", "--batch-size", "4", "--method", "curvature", "-q"]

    run("score", model, "--data", csv, "--stream", "-o", tmp_path / "r.h5", *fast)
    ranking = read_ranking(tmp_path / "r.h5")
    assert ranking.data["stream"] is True
    assert ranking.data["rows"] == 160
    assert max(ranking.row_ids) < 160
    run("select", tmp_path / "r.h5", "--flops", "0.7", "-o", tmp_path / "m.json")
    run("apply", model, tmp_path / "m.json", "-o", tmp_path / "small", "--samples", 9, "-q")
    assert own_data(read_mask(tmp_path / "m.json")) == DataSpec(
        str(csv), text=("text",), label="label", stream=True
    )
