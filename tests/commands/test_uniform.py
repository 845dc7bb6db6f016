"""`--uniform` through the commands."""

from __future__ import annotations

import json

import pytest
from helpers.cli import FAST, run
from helpers.data import tiny_image_folder, tiny_text_csv
from helpers.models import saved_model

from optin_cli.artefacts.mask import read_mask
from optin_cli.artefacts.point import read_sweep
from optin_cli.artefacts.pruned import read_pruned


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny_image_folder(tmp_path_factory.mktemp("images"))


def test_prune_writes_a_directory_that_needs_no_code(images, tmp_path):
    from transformers import AutoModelForImageClassification

    command = ("prune", saved_model("vit"), "--data", images, "--flops", 0.6, "--uniform", *FAST)
    done = run(*command, "-o", tmp_path / "m", "--ranking", tmp_path / "r.h5", "--json")
    assert "layers of different sizes would keep" in done.stderr
    found = json.loads(done.stdout)
    assert found["mask"]["budget"]["uniform"] is True
    assert found["mask"]["objective"]["free"]["kept"] >= found["mask"]["objective"]["kept"]
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["model_type"] == "vit" and config["head_dim"] == 8
    module = AutoModelForImageClassification.from_pretrained(tmp_path / "m")
    assert sum(p.numel() for p in module.parameters()) == found["params"]

    assert (
        "is already this model" in run(*command, "-o", tmp_path / "m", "--ranking", tmp_path / "r.h5").stderr
    )
    run("bench", tmp_path / "m", "--batch-size", 1, "--repeats", 1, "--seconds", 0.01)
    run("inspect", tmp_path / "m")
    assert read_pruned(tmp_path / "m").is_stock


def test_select_says_which_units_stay(tmp_path):
    run("score", saved_model("bert"), "--data", tiny_text_csv(tmp_path), "-o", tmp_path / "r.h5", *FAST, "-q")
    said = run("select", tmp_path / "r.h5", "--flops", "0.8", "--uniform", "-o", tmp_path / "m.json").stderr
    assert "heads stay, since the model's class can't have fewer" in said
    counts = [len(kept) for site, kept in read_mask(tmp_path / "m.json").keep.items() if "neurons" in site]
    assert len(set(counts)) == 1
    refused = run(
        "select", tmp_path / "r.h5", "--flops", "0.1", "--uniform", "-o", tmp_path / "n.json", code=4
    ).stderr
    assert "the smallest budget that can be reached is --flops" in refused


def test_a_class_without_sizes_is_refused_before_anything_is_scored(images, tmp_path):
    said = run(
        "prune", saved_model("timm-resnet"), "--data", images, "--flops", 0.6, "--uniform", *FAST,
        "-o", tmp_path / "m", "--ranking", tmp_path / "r.h5", code=2,
    ).stderr  # fmt: skip
    assert "says no sizes of what is pruned" in " ".join(said.split())
    assert not (tmp_path / "r.h5").exists()


def test_a_sweep_has_it_as_a_variant_that_is_timed(images, tmp_path):
    run(
        "sweep", saved_model("vit"), "--data", images, "--flops", 0.6, "--variant", "uniform", *FAST,
        "-o", tmp_path / "s", "--eval-split", "train", "--repeats", 1, "--seconds", 0.01, "--bench-batch-size", 1,
    )  # fmt: skip
    points = {point.name: point for point in read_sweep(tmp_path / "s").points}
    assert set(points) == {"flops-0.6", "flops-0.6-uniform"}
    assert points["flops-0.6-uniform"].budget["uniform"] and points["flops-0.6-uniform"].timings
    assert read_pruned(tmp_path / "s" / "flops-0.6-uniform").is_stock
    card = (tmp_path / "s" / "flops-0.6-uniform" / "README.md").read_text()
    assert "## Measured" in card and "model-index" in card
