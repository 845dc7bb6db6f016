"""Recordings through the commands: a classifier of folders, and a recogniser of speech."""

from __future__ import annotations

import json
import re

import pytest
import torch
from helpers.cli import run
from helpers.data import tiny_audio_folder
from helpers.models import saved_model

import optin_cli
from optin_cli.artefacts.ranking import read_ranking

FAST = ["--samples", "8", "--batch-size", "4", "--method", "curvature", "--probes", "1"]


def test_from_recordings_to_a_smaller_classifier(tmp_path):
    model = saved_model("whisper-classifier")
    data = tiny_audio_folder(tmp_path / "data", 20)
    (data / "low" / "003.wav").write_bytes(b"RIFF")
    ranking, mask, small = tmp_path / "r.h5", tmp_path / "m.json", tmp_path / "small"
    told = run("score", model, "--data", data, "-o", ranking, *FAST, "--samples", 19).stderr
    assert re.search(r"1 of 20 recordings of .* are broken and left out, others .*: row 11 \(003.wav", told)
    assert read_ranking(ranking).data["audio"] == "audio"
    run("select", ranking, "--flops", 0.6, "-o", mask)
    run("apply", model, mask, "-o", small)
    found = json.loads(
        run("eval", small, "--baseline", model, "--data", data, "--split", "train", "--json").stdout
    )
    assert (found["task"], found["examples"], found["broken"], found["main"]) == (
        "audio-classification",
        19,
        1,
        "accuracy",
    )
    assert found["fidelity"].keys() == {"agreement", "kl"}
    module = optin_cli.load(small)
    assert sum(p.numel() for p in module.parameters()) < sum(
        p.numel() for p in optin_cli.load(model).parameters()
    )


@pytest.mark.slow
def test_from_speech_to_a_smaller_recogniser(tmp_path):
    model = saved_model("whisper")
    data = tiny_audio_folder(tmp_path / "data", 12, transcripts=True)
    ranking, mask, small = tmp_path / "r.h5", tmp_path / "m.json", tmp_path / "small"
    run("score", model, "--data", data, "-o", ranking, *FAST)
    run("select", ranking, "--flops", 0.6, "-o", mask)
    run("apply", model, mask, "-o", small)
    args = ["eval", small, "--baseline", model, "--data", data / "train.csv", "--split", "train"]
    found = json.loads(run(*args, "--json").stdout)
    assert (found["task"], found["examples"], found["main"]) == ("speech-recognition", 12, "word_error_rate")
    rates = {"word_error_rate", "character_error_rate"}
    assert found["metrics"].keys() == {*rates, "perplexity", "accuracy"}
    assert found["fidelity"].keys() == {"agreement", "kl", *rates}
    dense, small_rate = (found[side]["word_error_rate"] for side in ("baseline_metrics", "metrics"))
    assert found["drop"] == pytest.approx(small_rate - dense)
    assert "rises by" in run(*args, "--max-drop", found["drop"] - 1, code=5).stderr
    made = optin_cli.load(small).generate(input_features=torch.zeros(1, 8, 100), max_new_tokens=5)
    assert made.shape[1] >= 1


def test_a_recording_that_is_gone_is_told_and_noise_compares(tmp_path):
    model, data = saved_model("whisper"), tiny_audio_folder(tmp_path / "data", 8, transcripts=True)
    ranking, mask = tmp_path / "r.h5", tmp_path / "m.json"
    run("score", model, "--data", data, "-o", ranking, *FAST)
    run("select", ranking, "--flops", 0.6, "-o", mask)
    (data / "train.csv").unlink()
    told = run("apply", model, mask, "-o", tmp_path / "small", "--compensate", "none").stderr
    assert "checking on random spectrograms instead" in told


def test_bench_takes_the_length_of_the_transcript(tmp_path):
    model = saved_model("whisper")
    fast = ["--repeats", 1, "--seconds", 0, "--batch-size", 1, "--json"]
    found = json.loads(run("bench", model, *fast).stdout)["timings"]
    assert found[0]["setting"]["size"] == 16
    assert "up to 16 tokens" in run("bench", model, "--seq-len", 17, *fast, code=2).stderr
    assert "reads audio" in run("bench", model, "--image-size", 17, *fast, code=2).stderr
    classifier = saved_model("whisper-classifier")
    assert "spectrograms of 100 frames" in run("bench", classifier, "--seq-len", 9, *fast, code=2).stderr


def test_an_encoder_without_a_head_is_refused(tmp_path):
    told = run("score", saved_model("whisper"), "--task", "embedding", "--data", "x", "-o", "r.h5", code=2)
    assert "can't do embedding" in told.stderr
