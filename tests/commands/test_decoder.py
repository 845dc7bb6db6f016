"""A decoder through the commands: prune, eval with its gate, bench, a latency table."""

from __future__ import annotations

import json

import pytest
from helpers.cli import run
from helpers.data import sentences
from helpers.models import saved_model


@pytest.mark.parametrize(
    ("name", "task"),
    [("gpt2", "language-modeling"), pytest.param("t5", "text-to-text", marks=pytest.mark.slow)],
)
def test_a_text_file_is_all_it_takes(name, task, tmp_path):
    model, out = saved_model(name), tmp_path / "out"
    data = tmp_path / "text"
    data.mkdir()
    for seed, split in enumerate(("train", "test")):
        (data / f"{split}.txt").write_text("\n".join(sentences(40, seed)) + "\n")
    cheap = ["--samples", "30", "--max-length", "16", "--batch-size", "6"]
    ranking = ["--ranking", tmp_path / "r.h5", "--method", "curvature"]
    run("prune", model, "--data", data, "--flops", "0.6", "-o", out, *ranking, *cheap)
    options = ["--baseline", model, "--data", data, "--split", "test", "--max-length", "16"]
    told = json.loads(run("eval", out, *options, "--json").stdout)
    assert (told["task"], told["main"]) == (task, "perplexity")
    rise = 100 * (told["metrics"]["perplexity"] / told["baseline_metrics"]["perplexity"] - 1)
    assert told["drop"] == pytest.approx(rise)
    run("eval", out, *options, "--max-drop", rise + 1)
    failed = run("eval", out, *options, "--max-drop", rise - 1, code=5)
    assert "perplexity rises by" in failed.stderr
    quick = ["--batch-size", "1", "--seq-len", "16", "--seconds", "0.05"]
    assert json.loads(run("bench", out, "--baseline", model, *quick, "--json").stdout)
    run("bench", model, "--table", tmp_path / "table.json", *quick)
