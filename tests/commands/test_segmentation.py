"""A segmentation model through the commands: folders and Parquet with masks in, mIoU out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.cli import run
from helpers.data import tiny_masks
from helpers.models import saved_model


def as_parquet(folder: Path, split: str) -> Path:
    """The folder's images and masks as encoded bytes."""
    files = {kind: sorted((folder / kind).iterdir()) for kind in ("images", "masks")}
    table = {"image": files["images"], "mask": files["masks"]}
    columns = {name: [path.read_bytes() for path in paths] for name, paths in table.items()}
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), folder / f"{split}.parquet")
    for paths in files.values():
        for path in paths:
            path.unlink()
    for kind in files:
        (folder / kind).rmdir()
    return folder


def test_eval_measures_masks_of_folders_and_tables_alike(tmp_path):
    model = saved_model("segformer")
    folder = tiny_masks(tmp_path / "folder", 6, void=11)
    options = ["--ignore-index", 11, "--batch-size", 4]
    one = json.loads(run("eval", model, "--data", folder, "--json", *options).stdout)
    assert one["main"] == "miou" and set(one["metrics"]) == {"miou", "pixel_accuracy"}
    # JPEG and PNG bytes are the same in both
    table = as_parquet(folder, "validation")
    two = json.loads(run("eval", model, "--data", table, "--json", *options).stdout)
    assert two["metrics"] == one["metrics"]


def test_bad_masks_are_one_sentence(tmp_path):
    folder = tiny_masks(tmp_path, 3, void=11)
    told = run("eval", saved_model("segformer"), "--data", folder, code=1).stderr
    assert "(000.png) has the ids 11" in told and "--ignore-index 11" in told
    told = run("eval", saved_model("segformer"), "--data", folder / "images", code=2).stderr
    assert "--mask" in told


def test_prune_runs_from_scores_to_an_evaluated_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, model = tiny_masks(tmp_path / "data", 12), saved_model("segformer")
    run(
        "prune", model, "--data", folder, "--flops", 0.7, "-o", tmp_path / "small", "--samples", 8, "--batch-size", 4
    )  # fmt: skip
    told = run("eval", tmp_path / "small", "--baseline", model, "--data", folder, "--json").stdout
    found = json.loads(told)
    assert found["drop"] == pytest.approx(found["baseline_metrics"]["miou"] - found["metrics"]["miou"])
    assert 0 < found["fidelity"]["agreement"] <= 100
    ranking = tmp_path / "fisher.h5"
    run(
        "score", model, "--data", folder, "-o", ranking, "--method", "fisher", "--samples", 8, "--batch-size", 4
    )  # fmt: skip
    assert ranking.is_file()
