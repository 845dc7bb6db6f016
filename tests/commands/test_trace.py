"""`optin families --trace`: what it writes, what it prints, and that the table prunes the model."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import yaml
from helpers.cli import run
from helpers.data import tiny_image_folder, tiny_text_csv
from helpers.models import new_folder, saved_model
from helpers.traced import save_unlisted

import optin_cli
from optin_cli import console
from optin_cli.architectures.families import family_from_dict, read_family
from optin_cli.artefacts.pruned import read_pruned

FAST = ["--samples", "12", "--batch-size", "6", "--probes", "1", "--compensate-samples", "12"]


@cache
def ernie() -> Path:
    return save_unlisted("ernie", new_folder() / "ernie", "ForSequenceClassification")


@pytest.mark.parametrize(
    ("name", "head", "kinds"),
    [
        ("ernie", "ForSequenceClassification", {"heads", "neurons"}),
        pytest.param("nomic", "ForSequenceClassification", {"heads", "neurons"}, marks=pytest.mark.slow),
        pytest.param("granite", "ForCausalLM", {"heads", "neurons"}, marks=pytest.mark.slow),
        pytest.param("mobilenet_v2", "ForImageClassification", {"channels"}, marks=pytest.mark.slow),
    ],
)
def test_a_traced_model_is_pruned_with_its_table(tmp_path, name, head, kinds):
    model = save_unlisted(name, tmp_path / "model", head)
    image = "Image" in head
    data = tiny_image_folder(tmp_path / "images", n=24) if image else tiny_text_csv(tmp_path)
    refused = run("prune", model, "--data", data, "--flops", 0.6, "-o", tmp_path / "out", code=1)
    assert "optin families --trace" in refused.stderr
    table = tmp_path / "family.yaml"
    run("families", "--trace", model, "-o", table, "-q")
    told = run("prune", model, "--data", data, "--flops", 0.6, "--anatomy", table, "-o", tmp_path / "out",
               "--ranking", tmp_path / "r.h5", *FAST, "--json")  # fmt: skip
    record = read_pruned(tmp_path / "out")
    assert {name.split(".")[2] for name in record.kept} == kinds
    assert json.loads(told.stdout)["mask"]["reached"]["flops"] <= 0.6
    optin_cli.load(tmp_path / "out")  # without the table: the folder carries it
    run("eval", tmp_path / "out", "--data", data, "--split", "train")


def test_a_pipe_gets_the_table_alone(monkeypatch):
    monkeypatch.setattr(console, "_PLAIN_INTERVAL", 0.0)
    result = run("families", "--trace", ernie())
    assert family_from_dict(yaml.safe_load(result.stdout)).blocks == "encoder.layer"
    assert "attention.self.query" in result.stderr and "verified" in result.stderr
    told = (
        "running the model",
        "looking at ernie",
        "trying ernie",
        "checking all sites on the whole model",
    )
    assert [what for what in told if what not in result.stderr] == []  # progress from the start
    assert run("families", "--trace", ernie(), "-q").stderr == ""


def test_the_file_says_what_the_pipe_says(tmp_path):
    path = tmp_path / "ernie.yaml"
    assert run("families", "--trace", ernie(), "-o", path).stdout == f"{path}\n"
    assert path.read_text() == run("families", "--trace", ernie(), "-q").stdout
    assert [p.name for p in tmp_path.iterdir()] == ["ernie.yaml"]
    assert read_family(path).matches == ("ernie",)


def test_another_file_is_replaced_only_when_told_to(tmp_path):
    path = tmp_path / "ernie.yaml"
    path.write_text("mine")
    refused = run("families", "--trace", ernie(), "-o", path, code=2)
    assert "--force" in refused.stderr and path.read_text() == "mine"
    run("families", "--trace", ernie(), "-o", path, "--force")
    before = path.stat().st_mtime_ns
    run("families", "--trace", ernie(), "-o", path)  # the same again
    assert path.stat().st_mtime_ns == before


def test_json_holds_the_table_and_what_was_left_out():
    told = json.loads(run("families", "--trace", ernie(), "--json", "-q").stdout)
    assert family_from_dict(told["family"]).name == "ernie"
    assert told["listed"] is None and told["left_out"] == []
    heads = told["sites"][0]
    assert (heads["name"], heads["blocks"], heads["units"]) == ("heads", [0, 1, 2], [[4, 8]])
    weights = 4 * 32 * 32 * 3  # of three blocks' q, k, v and output projections
    assert heads["macs"] == told["positions"] * weights + 2 * told["positions"] ** 2 * 32 * 3
    assert heads["params"] == weights + 3 * 32 * 3


def test_a_listed_model_is_traced_all_the_same():
    result = run("families", "--trace", saved_model("bert"))
    assert "listed already, as 'bert'" in result.stderr
    assert family_from_dict(yaml.safe_load(result.stdout)).matches == ("bert",)


@pytest.mark.parametrize(
    "option", [["-o", "x.yaml"], ["--task", "embedding"], ["--modality", "text"], ["--force"], ["-q"]]
)
def test_what_belongs_to_a_trace_needs_a_model(option):
    assert "--trace MODEL" in run("families", *option, code=2).stderr


def test_what_is_left_out_is_told_in_the_table_and_in_the_file(tmp_path):
    model = save_unlisted("bloom", tmp_path / "model", "ForSequenceClassification")
    result = run("families", "--trace", model)
    for text in (result.stdout, result.stderr):
        assert "it does not run without 1 of its 4 units" in text.replace("\n", " ")


def test_a_model_without_blocks_is_an_error_that_says_what_was_looked_for(tmp_path):
    model = save_unlisted("albert", tmp_path / "model", "ForSequenceClassification")
    assert "runs 3 times" in run("families", "--trace", model, code=1).stderr.replace("\n", " ")
