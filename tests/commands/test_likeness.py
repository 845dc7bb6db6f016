"""Data that look unlike what a model was pruned on, on the command line and in Python."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.cli import run
from helpers.data import WORDS, tiny_image_folder
from helpers.models import saved_model, tiny_model

import optin_cli as optin
from optin_cli.artefacts.pruned import read_pruned

UNLIKE = "texts look unlike those that the model was pruned on"
FEW = ["--samples", 100, "--batch-size", 50, "--probes", 1]


def texts(path, words, seed, count=100):
    random = np.random.default_rng(seed)
    lines = [" ".join(random.choice(words, random.integers(6, 12))) for _ in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """`prune` keeps its ranking in the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two samples over one half of the words, and one over the other half."""
    folder = tmp_path_factory.mktemp("data")
    half = len(WORDS) // 2
    return {
        "seen": texts(folder / "seen.txt", WORDS[:half], 0),
        "like": texts(folder / "like.txt", WORDS[:half], 1),
        "unlike": texts(folder / "unlike.txt", WORDS[half:], 2),
    }


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return tiny_model("bert", tmp_path_factory.mktemp("model"), "encoder", num_hidden_layers=2)


@pytest.mark.parametrize("compensate", [pytest.param("none", marks=pytest.mark.slow), "auto"])
def test_eval_compares_with_the_data_that_a_directory_was_pruned_on(encoder, data, tmp_path, compensate):
    small = tmp_path / "small"
    run(
        "prune",
        encoder,
        "--data",
        data["seen"],
        "--flops",
        0.6,
        "-o",
        small,
        *FEW,
        "--compensate",
        compensate,
        "-q",
    )
    found = {}
    for name, path in data.items():
        done = run("eval", small, "--baseline", encoder, "--data", path, "--split", "train", "--json")
        found[name] = json.loads(done.stdout)["unlike"]
    assert found["seen"] == found["like"] == ""
    assert UNLIKE in found["unlike"]
    told = run("eval", small, "--baseline", encoder, "--data", data["unlike"], "--split", "train").stderr
    assert UNLIKE in " ".join(told.split())


def test_a_record_of_older_versions_says_nothing(encoder, data, tmp_path):
    small = tmp_path / "small"
    run("prune", encoder, "--data", data["seen"], "--flops", 0.6, "-o", small, *FEW, "-q")
    path = small / "optin.json"
    record = json.loads(path.read_text())
    del record["history"][-1]["content"]
    path.write_text(json.dumps(record))
    assert read_pruned(small).history[-1].get("content") is None
    done = run("eval", small, "--baseline", encoder, "--data", data["unlike"], "--split", "train", "--json")
    assert json.loads(done.stdout)["unlike"] == ""


@pytest.mark.parametrize(("name", "times"), [("unlike", 1), pytest.param("like", 0, marks=pytest.mark.slow)])
def test_a_sweep_warns_once(encoder, data, tmp_path, name, times):
    told = run(
        "sweep", encoder, "--data", data["seen"], "--eval-data", data[name], "--eval-split", "train",
        "--flops", "0.8,0.5", "-o", tmp_path / "sweep", "--compensate", "none", "--no-bench", *FEW,
    ).stderr  # fmt: skip
    assert " ".join(told.split()).count(UNLIKE) == times


def test_in_memory_it_is_the_same(encoder, data):
    rows = {name: path.read_text().splitlines() for name, path in data.items()}
    small = optin.prune(encoder, rows["seen"], flops=0.6, samples=100, probes=1)
    assert optin.evaluate(small, rows["like"], baseline=encoder).unlike == ""
    assert UNLIKE in optin.evaluate(small, rows["unlike"], baseline=encoder).unlike


def test_images_are_compared_by_brightness_and_detail(tmp_path):
    from PIL import Image

    bright = tiny_image_folder(tmp_path / "bright", n=48)
    dark = tmp_path / "dark"
    for path in bright.rglob("*.png"):
        target = dark / path.relative_to(bright)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).convert("RGB").point(lambda value: value // 5).save(target)
    model, small = saved_model("vit"), tmp_path / "small"
    run("prune", model, "--data", bright, "--flops", 0.6, "-o", small, "--samples", 48, "--probes", 1, "-q")
    found = [
        json.loads(
            run("eval", small, "--baseline", model, "--data", folder, "--split", "train", "--json").stdout
        )
        for folder in (bright, dark)
    ]
    assert found[0]["unlike"] == "" and "data looks unlike" in found[1]["unlike"]
