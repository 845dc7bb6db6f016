"""Merging tokens through the commands: score, select, apply, then every command on what was written."""

from __future__ import annotations

import json

import pytest
from helpers.cli import run
from helpers.data import tiny_image_folder, tiny_text_csv
from helpers.models import opened, saved_model

FAST = ["--samples", "12", "--batch-size", "6", "--method", "curvature", "--probes", "1"]


@pytest.mark.parametrize("name", [pytest.param("vit", marks=pytest.mark.slow), "timm-vit"])
def test_tokens_from_score_to_a_model_that_every_command_takes(name, tmp_path):
    model, data = saved_model(name), tiny_image_folder(tmp_path / "images")
    ranking, mask, out = tmp_path / "r.h5", tmp_path / "m.json", tmp_path / "out"
    run("score", model, "--data", data, "--tokens", "-o", ranking, *FAST)
    assert "merging tokens" in run("inspect", ranking).stdout
    nets = {}
    for merge in ("none", "only", "joint"):
        told = json.loads(
            run(
                "select", ranking, "--flops", "0.6", "--tokens", merge, "-o", mask, "--json", "--force"
            ).stdout
        )
        assert told["reached"]["flops"] <= 0.6
        nets[merge] = told["objective"]["kept"] - told["objective"].get("merging", 0)
    assert nets["joint"] >= max(nets.values())
    run("select", ranking, "--flops", "0.6", "--tokens", "only", "-o", mask, "--force")
    merges = json.loads(mask.read_text())["merges"]
    assert sum(merges) > 0 and "tokens merged" in run("inspect", mask).stdout
    run("apply", model, mask, "-o", out, "--compensate", "none")
    assert opened(out).merges == merges
    assert json.loads(run("inspect", out, "--json").stdout)["merges"] == merges
    run("eval", out, "--baseline", model, "--data", data, "--samples", "8")
    bench = json.loads(
        run("bench", out, "--baseline", model, "--batch-size", "2", "--seconds", "0.1", "--json").stdout
    )
    assert bench
    # pruned again it keeps merging, whether or not the mask is about tokens
    run("score", out, "--data", data, "-o", tmp_path / "again.h5", *FAST)
    run("select", tmp_path / "again.h5", "--flops", "0.5", "-o", tmp_path / "again.json")
    run("apply", out, tmp_path / "again.json", "-o", tmp_path / "twice", "--compensate", "none")
    assert opened(tmp_path / "twice").merges == merges


def test_prune_merges_tokens_and_weights_in_one_call(tmp_path):
    data = tiny_image_folder(tmp_path / "images")
    options = ["--data", data, "--flops", "0.5", "--tokens", "joint", "--ranking", tmp_path / "r.h5"]
    told = json.loads(
        run("prune", saved_model("vit"), *options, *FAST, "-o", tmp_path / "out", "--json").stdout
    )
    assert opened(tmp_path / "out").merges == told["mask"]["merges"]
    assert told["mask"]["reached"]["flops"] <= 0.5


def test_what_makes_no_sense_is_told_in_a_sentence(tmp_path):
    text, images = tiny_text_csv(tmp_path), tiny_image_folder(tmp_path / "images")
    refused = run("score", saved_model("bert"), "--data", text, "--tokens", "-o", tmp_path / "r.h5", code=1)
    assert "no tokens that can be merged" in refused.stderr
    run("score", saved_model("vit"), "--data", images, "-o", tmp_path / "r.h5", *FAST)
    options = ["select", tmp_path / "r.h5", "-o", tmp_path / "m.json", "--tokens"]
    assert "optin score --tokens" in run(*options, "joint", "--flops", "0.5", code=2).stderr
    assert "--flops" in run(*options, "joint", "--params", "0.9", code=2).stderr
    assert "joint" in run(*options, "both", "--flops", "0.5", code=2).stderr


def test_a_schedule_longer_than_the_model_is_refused(tmp_path):
    data = tiny_image_folder(tmp_path / "images")
    run("score", saved_model("vit"), "--data", data, "-o", tmp_path / "r.h5", *FAST)
    run("select", tmp_path / "r.h5", "--flops", "0.6", "-o", tmp_path / "m.json")
    mask = json.loads((tmp_path / "m.json").read_text())
    (tmp_path / "m.json").write_text(json.dumps({**mask, "merges": [1, 1, 1, 1]}))
    refused = run("apply", saved_model("vit"), tmp_path / "m.json", "-o", tmp_path / "out", code=3)
    assert "4 blocks, and the model has 3" in refused.stderr and not (tmp_path / "out").exists()


def test_families_say_whose_tokens_merge():
    told = run("families").stdout
    assert any("timm-vit" in line and "tokens" in line for line in told.splitlines())
