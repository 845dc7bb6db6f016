"""`select --interactions`, `select --feature-weights` and `inspect --stability` as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.cli import run
from helpers.data import tiny_text_csv
from helpers.models import saved_model

from optin_cli.artefacts.mask import read_mask


def refused(code: int, says: str, *args) -> None:
    text = " ".join(run(*args, code=code).stderr.split())
    assert says in text, text
    assert text.count("error:") == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`r.h5`, a ranking of 6 batches with a sketch, `bare.h5` of two batches without, and `m.h5` by magnitude."""
    found = tmp_path_factory.mktemp("interactions")
    data = tiny_text_csv(found, rows=36)
    score = ("score", saved_model("bert"), "--data", data, "--samples", 36, "-q", "--method")
    run(*score, "curvature", "--batch-size", 6, "-o", found / "r.h5")
    run(*score, "curvature", "--batch-size", 18, "--no-sketch", "-o", found / "bare.h5")
    run(*score, "magnitude", "-o", found / "m.h5")
    return found


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_select_says_what_the_interactions_did(folder, tmp_path, scope):
    path = tmp_path / "m.json"
    result = run("select", folder / "r.h5", "--flops", 0.5, "--interactions", scope, "-o", path)
    mask = read_mask(path)
    found = mask.objective["interactions"]
    assert mask.budget["interactions"] == scope
    assert mask.reached["flops"] <= 0.5
    words = "kept the units as they were" if not found["moved"] else f"moved {found['moved']} units"
    assert words in " ".join(result.stderr.split())
    assert words in run("inspect", path).stdout
    assert json.loads(run("inspect", path, "--json").stdout)["objective"]["interactions"] == found


def test_select_leaves_interactions_alone_by_default(folder, tmp_path):
    result = run("select", folder / "bare.h5", "--flops", 0.5, "-o", tmp_path / "m.json")
    assert read_mask(tmp_path / "m.json").objective["interactions"] is None
    assert "units as they were" not in result.stderr
    assert "interactions" not in run("inspect", tmp_path / "m.json").stdout


def test_select_weighs_features(folder, tmp_path):
    ranking, target = folder / "r.h5", tmp_path / "m-{}.json"
    run("select", ranking, "--flops", "0.5", "--feature-weights", "0,0,1", "-o", str(target))
    run("select", ranking, "--flops", "0.5", "--feature-weights", "last", "-o", tmp_path / "last.json")
    named, listed = read_mask(tmp_path / "last.json"), read_mask(tmp_path / "m-0.5.json")
    assert named.keep == listed.keep
    assert (named.budget["feature_weights"], listed.budget["feature_weights"]) == ("last", [0, 0, 1])


def test_what_a_ranking_can_not_serve_is_refused(folder, tmp_path):
    out = ("--flops", 0.5, "-o", tmp_path / "m.json")
    refused(2, "holds no sketch", "select", folder / "bare.h5", *out, "--interactions", "layer")
    refused(2, "--interactions pairs", "select", folder / "r.h5", *out, "--interactions", "pairs")
    refused(2, "no parts to recombine", "select", folder / "m.h5", *out, "--feature-weights", "deep")
    refused(2, "2 weights for 3 blocks", "select", folder / "r.h5", *out, "--feature-weights", "1,1")
    refused(2, "not a list of numbers", "select", folder / "r.h5", *out, "--feature-weights", "1,x")
    assert not list(tmp_path.iterdir())


def test_prune_exchanges_too_and_refuses_before_scoring(folder, tmp_path):
    data = folder / "train.csv"
    command = ("prune", saved_model("bert"), "--data", data, "--flops", 0.5, "--compensate", "none")
    few = ("--samples", 12, "--batch-size", 6, "-o", tmp_path / "out", "--ranking", tmp_path / "r.h5")
    refused(2, "makes none", *command, *few, "--method", "magnitude", "--interactions", "global")
    refused(2, "no parts", *command, *few, "--method", "magnitude", "--feature-weights", "deep")
    assert not list(tmp_path.iterdir())
    told = run(*command, *few, "--method", "curvature", "--interactions", "global", "--json").stdout
    assert json.loads(told)["mask"]["objective"]["interactions"]["ridge"] > 0


# ---- stability ----


def test_inspect_tells_how_stable_a_ranking_is(folder):
    result = run("inspect", folder / "r.h5", "--stability")
    assert "36 examples" in result.stdout
    found = json.loads(run("inspect", folder / "r.h5", "--stability", "--json").stdout)
    assert set(found["agreement"]) == {"all", "heads", "neurons"}
    every = found["agreement"]["all"]
    assert 0 < every["halves"] < every["full"] < 1
    assert f"{every['full']:.3f}" in result.stdout
    assert found["near"]["0.6"][0]["low"] <= found["near"]["0.6"][0]["score"]


def test_low_agreement_is_warned_of_with_the_samples_that_would_mend_it(folder):
    needed = json.loads(run("inspect", folder / "r.h5", "--stability", "--target", 0.999, "--json").stdout)[
        "needed"
    ]
    low = run("inspect", folder / "r.h5", "--stability", "--target", 0.999)
    assert needed > 36
    assert "warning:" in low.stderr
    assert f"--samples {needed} for 0.999" in " ".join(low.stderr.split())
    assert "warning:" not in run("inspect", folder / "r.h5", "--stability", "--target", 0.01).stderr


def test_two_batches_or_none_can_not_tell(folder):
    assert "can't be told from 2 batches" in run("inspect", folder / "bare.h5", "--stability").stdout
    told = json.loads(run("inspect", folder / "m.h5", "--stability", "--json").stdout)
    assert told["agreement"] is None
    assert "no scores by batch" in told["note"]


def test_wrong_questions(folder, tmp_path):
    refused(2, "no rank agreement", "inspect", folder / "r.h5", "--stability", "--target", 1)
    run("select", folder / "r.h5", "--flops", 0.5, "-o", tmp_path / "m.json", "-q")
    refused(3, "is a mask, not a ranking", "inspect", tmp_path / "m.json", "--stability")
