"""Lengths of texts on the command line: what was seen is said and recorded, what goes beyond it is warned of."""

from __future__ import annotations

import json

import pytest
from helpers.cli import FAST, run
from helpers.data import sentences, tiny_text_csv
from helpers.families import MAX_LENGTH
from helpers.models import saved_model, shared_model

from optin_cli.artefacts.pruned import read_pruned
from optin_cli.artefacts.ranking import read_ranking
from optin_cli.data.examples import sample
from optin_cli.data.sources import DataSpec


@pytest.fixture
def pairs(tmp_path):
    return tiny_text_csv(tmp_path, rows=60)


def tokens(data, cut: int) -> list[int]:
    """Of every row, counted by the tokenizer alone."""
    rows = sample(DataSpec(str(data)), "text", None, 0).rows
    tokenizer = shared_model("bert").processor.tokenizer
    found = tokenizer(rows["sentence1"][:], rows["sentence2"][:], truncation=True, max_length=cut)
    return [len(ids) for ids in found["input_ids"]]


def test_what_was_seen_is_said_recorded_and_compared(pairs, tmp_path):
    ranking, mask, out = tmp_path / "r.h5", tmp_path / "m.json", tmp_path / "out"
    calibration = ["--data", pairs, "--max-length", 12, "--samples", 60]
    scored = run("score", saved_model("bert"), *calibration, "-o", ranking, *FAST[2:])
    counts = tokens(pairs, 12)
    seen = {"shortest": min(counts), "median": sorted(counts)[30], "longest": 12, "takes": MAX_LENGTH}
    assert read_ranking(ranking).data["lengths"] == seen
    assert f"the texts have {min(counts)} to 12 tokens, median 12" in " ".join(scored.stderr.split())
    warned = f"on texts of at most 12 tokens, and the model takes {MAX_LENGTH}"
    assert warned in " ".join(scored.stderr.split())
    run("select", ranking, "--flops", 0.5, "-o", mask, "-q")

    plain = run("apply", saved_model("bert"), mask, "-o", out, "--compensate", "none")
    assert read_pruned(out).history[-1]["lengths"] == {"scored": seen, "refitted": None}
    assert "takes" not in plain.stderr
    found = run("eval", out, "--data", pairs, "--split", "train", "--json")
    longer = sum(count > 12 for count in tokens(pairs, MAX_LENGTH))
    assert 0 < longer < 60
    evaluated = json.loads(found.stdout)
    assert (evaluated["seen"], evaluated["longer"]) == (12, longer)
    assert evaluated["longest"] == max(tokens(pairs, MAX_LENGTH))
    told = " ".join(run("eval", out, "--data", pairs, "--split", "train").stderr.split())
    assert f"{longer} of 60 texts are longer than any that the model was pruned on" in told
    assert (
        "longer than" not in run("eval", out, "--data", pairs, "--split", "train", "--max-length", 12).stderr
    )
    dense = json.loads(run("eval", saved_model("bert"), "--data", pairs, "--split", "train", "--json").stdout)
    assert (dense["seen"], dense["longer"]) == (None, 0)


def test_a_refit_covers_what_the_model_takes(pairs, tmp_path):
    ranking, mask, out = tmp_path / "r.h5", tmp_path / "m.json", tmp_path / "out"
    run("score", saved_model("bert"), "--data", pairs, "-o", ranking, "--method", "magnitude", "-q")
    run("select", ranking, "--flops", 0.5, "-o", mask, "-q")
    told = run("apply", saved_model("bert"), mask, "-o", out, "--max-length", 12)
    refitted = read_pruned(out).history[-1]["lengths"]["refitted"]
    assert (refitted["longest"], refitted["takes"]) == (MAX_LENGTH, MAX_LENGTH)
    assert f"to {MAX_LENGTH} tokens, median 12" in told.stderr
    assert "may be worse" not in told.stderr
    shown = " ".join(run("inspect", out).stdout.split())
    assert f"refitted on texts {refitted['shortest']} to {MAX_LENGTH} tokens" in shown
    evaluated = json.loads(run("eval", out, "--data", pairs, "--split", "train", "--json").stdout)
    assert (evaluated["seen"], evaluated["longer"]) == (MAX_LENGTH, 0)


def test_a_sweep_warns_once_of_longer_texts_that_it_measures_on(pairs, tmp_path):
    short = tmp_path / "short.csv"
    rows = zip(*(sentences(16, seed, (2, 4)) for seed in (0, 1)), strict=True)
    short.write_text("\n".join(["sentence1,sentence2", *map(",".join, rows)]) + "\n")
    told = run(
        "sweep", saved_model("bert"), "--data", short, "--eval-data", pairs, "--eval-split", "train",
        "--flops", "0.7,0.4", "-o", tmp_path / "sweep", "--compensate", "none", "--no-bench", *FAST,
    ).stderr  # fmt: skip
    assert " ".join(told.split()).count("texts are longer than any that the model was pruned on") == 1
