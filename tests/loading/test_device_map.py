"""A model spread over devices. One machine without a GPU has the CPU and the disk: enough to move layers about."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers.cli import run
from helpers.data import tiny_text_csv
from helpers.models import saved_model, shared_model

from optin_cli.artefacts.ranking import read_ranking
from optin_cli.data.sources import DataSpec
from optin_cli.errors import UsageError
from optin_cli.loading.checkpoint import open_model
from optin_cli.scoring import score as stage
from optin_cli.scoring.plan import ScoreSettings, make_plan

SPREAD = {
    "bert.embeddings": "cpu",
    "bert.encoder.layer.0": "disk",
    "bert.encoder.layer.1": "cpu",
    "bert.encoder.layer.2": "disk",
    "bert.pooler": "cpu",
    "classifier": "cpu",
}
FAST = ["--samples", "8", "--batch-size", "4", "-q"]


def test_layers_on_disk_score_like_layers_in_memory(tmp_path, caplog):
    csv = tiny_text_csv(tmp_path)
    settings = ScoreSettings(method="curvature", samples=8, batch_size=4)
    with caplog.at_level("WARNING", logger="optin"):
        spread = open_model(str(saved_model("bert")), dtype="float32", device_map=SPREAD)
    assert "does not fit on the devices" in caplog.text
    layer = spread.module.get_submodule(spread.anatomy.blocks[0])
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert spread.device == torch.device("cpu")
    assert spread.stored_dtype == torch.float32
    one, two = (
        stage.score(make_plan(model, DataSpec(str(csv)), settings), tmp_path / f"{name}.h5")
        for name, model in (("spread", spread), ("whole", shared_model("bert")))
    )
    assert one.digest == two.digest
    for a, b in zip(one.sites, two.sites, strict=True):
        np.testing.assert_array_equal(a.score, b.score)


def test_the_command_spreads_a_pruned_model_too(tmp_path):
    csv, model = tiny_text_csv(tmp_path), saved_model("bert")
    run("score", model, "--data", csv, "-o", tmp_path / "r.h5", *FAST)
    run("select", tmp_path / "r.h5", "--flops", "0.6", "-o", tmp_path / "m.json")
    run("apply", model, tmp_path / "m.json", "-o", tmp_path / "small", "--compensate", "none")
    command = ["score", tmp_path / "small", "--data", csv, "--method", "curvature", *FAST]
    run(*command, "-o", tmp_path / "spread.h5", "--device-map", "auto")
    run(*command, "-o", tmp_path / "plain.h5")
    assert read_ranking(tmp_path / "spread.h5").digest == read_ranking(tmp_path / "plain.h5").digest
    kept = json.loads((tmp_path / "small/optin.json").read_text())["kept"]
    assert {s.name: s.units for s in read_ranking(tmp_path / "spread.h5").sites} == {
        name: len(units) for name, units in kept.items()
    }


@pytest.mark.parametrize("method", ["mixed", "ablation", "magnitude"])
def test_other_methods_are_refused_before_anything_is_opened(method, tmp_path):
    result = run(
        "score", tmp_path / "nothing", "--data", "no.csv", "-o", tmp_path / "r.h5", "--method", method,
        "--device-map", "auto", code=2,
    )  # fmt: skip
    assert "--method curvature" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("bert", {"device_map": "everywhere"}, "balanced"),
        ("bert", {"device_map": "auto", "device": "cpu"}, "leave one out"),
        ("timm-vit", {"device_map": "auto"}, "timm"),
    ],
)
def test_maps_that_make_no_sense(name, options, words):
    with pytest.raises(UsageError, match=words):
        open_model(str(saved_model(name)), **options)
