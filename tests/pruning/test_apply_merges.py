"""A schedule of merges in a mask: written beside the weights, installed by loading, kept when pruned again."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from helpers.data import tiny_image_folder, tiny_text_csv
from helpers.models import opened, saved_model
from helpers.runs import random_inputs

import optin_cli
from optin_cli.artefacts.pruned import FILE_NAME, read_pruned
from optin_cli.compensation.plan import make_plan as make_compensation
from optin_cli.compensation.settings import Compensation
from optin_cli.data.sources import DataSpec
from optin_cli.errors import ArtefactError
from optin_cli.execution.macs import count_macs
from optin_cli.measure.latency import ideal_speedup
from optin_cli.pruning import apply as stage
from optin_cli.scoring import score as scoring
from optin_cli.scoring.plan import ScoreSettings, make_plan
from optin_cli.selection.select import select
from optin_cli.transforms.masking import masked, masks_from_keep
from optin_cli.transforms.token_merging import install_merges

FAMILIES = ["vit", "deit", "timm-vit", "dinov2-registers", "timm-post-norm", "clip-image-classifier"]


def mask_of(model, folder, merges, flops=0.6, method="magnitude"):
    data = DataSpec(str(tiny_image_folder(folder / "images")))
    settings = ScoreSettings(method=method, samples=8)
    ranking = scoring.score(make_plan(model, data, settings), folder / f"{method}-{model.digest[:8]}.h5")
    return dataclasses.replace(select(ranking, flops), merges=merges)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_written_model_merges_what_the_masked_one_does(name, tmp_path):
    dense = opened(saved_model(name))
    mask = mask_of(dense, tmp_path, [3, 2])
    applied = stage.apply(opened(saved_model(name)), mask, tmp_path / "out")
    assert applied.deviation < 1e-9  # in float64
    pruned = opened(tmp_path / "out")
    assert pruned.merges == [3, 2] and read_pruned(tmp_path / "out").merges == [3, 2]
    inputs = random_inputs(dense)
    install_merges(dense.module, dense.anatomy, [3, 2], mask.keep)
    with torch.no_grad(), masked(dense.module, dense.anatomy, masks_from_keep(dense.anatomy, mask.keep)):
        expected = dense.output(inputs)
    with torch.no_grad():
        torch.testing.assert_close(pruned.output(inputs), expected, rtol=0, atol=1e-4)
        with pruned.unmerged():
            assert (pruned.output(inputs) - expected).abs().max() > 1e-4
        library = optin_cli.load(tmp_path / "out")
        torch.testing.assert_close(pruned.task.output(library, inputs), pruned.output(inputs))


@pytest.mark.parametrize("name", [pytest.param("vit", marks=pytest.mark.slow), "timm-vit"])
def test_merging_makes_the_written_model_cheaper(name, tmp_path):
    dense = opened(saved_model(name))
    sites = {}
    for merges in ([], [4, 3]):
        mask = mask_of(dense, tmp_path, merges)
        stage.apply(opened(saved_model(name)), mask, tmp_path / f"out{len(merges)}")
        sites[len(merges)] = opened(tmp_path / f"out{len(merges)}")
    inputs = random_inputs(dense)
    assert count_macs(sites[2], inputs) < count_macs(sites[0], inputs) < count_macs(dense, inputs)
    assert ideal_speedup(dense, sites[2], 32) > ideal_speedup(dense, sites[0], 32)


def test_pruning_again_keeps_the_schedule_unless_the_mask_says_other(tmp_path):
    stage.apply(
        opened(saved_model("vit")), mask_of(opened(saved_model("vit")), tmp_path, [3, 2]), tmp_path / "one"
    )
    for merges in ([3, 2], [1], []):
        again = mask_of(opened(tmp_path / "one"), tmp_path, merges, flops=0.4)
        stage.apply(opened(tmp_path / "one"), again, tmp_path / f"two-{len(merges)}")
        assert opened(tmp_path / f"two-{len(merges)}").merges == merges


@pytest.mark.parametrize("method", ["full", pytest.param("bias", marks=pytest.mark.slow)])
def test_weights_are_compensated_on_whole_sequences(method, tmp_path):
    """The same weights with and without a schedule, and where the model merged before."""
    weights = []
    for merges, source in (([], saved_model("vit")), ([3, 2], saved_model("vit"))):
        model = opened(source)
        mask = mask_of(model, tmp_path, merges)
        plan = make_compensation(model, mask, Compensation(method, samples=8))
        stage.apply(model, mask, tmp_path / f"{len(merges)}", plan=plan)
        weights.append(opened(tmp_path / f"{len(merges)}").module.state_dict())
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value)


def test_a_schedule_longer_than_the_model_is_refused(tmp_path):
    model = opened(saved_model("vit"))
    with pytest.raises(ArtefactError, match="4 blocks, and the model has 3"):
        stage.apply(model, mask_of(model, tmp_path, [1, 1, 1, 0]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_without_token_sites_refuses_a_schedule(tmp_path):
    model = opened(saved_model("bert"))
    plan = make_plan(
        model, DataSpec(str(tiny_text_csv(tmp_path))), ScoreSettings(method="magnitude", samples=8)
    )
    mask = dataclasses.replace(select(scoring.score(plan, tmp_path / "r.h5"), 0.6), merges=[1])
    with pytest.raises(ArtefactError, match="no sites of tokens"):
        stage.apply(model, mask, tmp_path / "out")


@pytest.mark.parametrize(
    ("merges", "told"),
    [
        ([1, 1, 1, 1], "has 3"),
        (["1"], r"merges\[0\] must be a whole number"),
        ([0, 0, 2], "last"),
        (3, "list"),
    ],
)
def test_a_damaged_schedule_in_a_record_is_named(merges, told, tmp_path):
    model = opened(saved_model("vit"))
    stage.apply(model, mask_of(model, tmp_path, [1]), tmp_path / "out")
    record = json.loads((tmp_path / "out" / FILE_NAME).read_text())
    (tmp_path / "out" / FILE_NAME).write_text(json.dumps({**record, "merges": merges}))
    with pytest.raises(ArtefactError, match=told):
        opened(tmp_path / "out")
