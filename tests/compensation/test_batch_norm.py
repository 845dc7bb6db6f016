"""`--bn`: statistics of BatchNorms after pruning, against those that a sliced model measures itself."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from helpers.cli import run
from helpers.data import tiny_image_folder, tiny_text_csv
from helpers.models import saved_model

from optin_cli.artefacts.mask import write_mask
from optin_cli.artefacts.pruned import read_pruned
from optin_cli.compensation.batch_norm import reestimate
from optin_cli.compensation.plan import make_plan
from optin_cli.compensation.settings import Compensation
from optin_cli.data.sources import DataSpec
from optin_cli.errors import UsageError
from optin_cli.loading.checkpoint import open_model
from optin_cli.pruning import apply as stage
from optin_cli.scoring import score as scoring
from optin_cli.scoring.plan import ScoreSettings
from optin_cli.scoring.plan import make_plan as make_scoring_plan
from optin_cli.selection.select import select
from optin_cli.transforms.slicing import slice_model


def ranked(name, folder):
    """A tiny model and a mask of half of its MACs."""
    model = open_model(str(saved_model(name)), device="cpu")
    image = model.family.modality == "image"
    data = DataSpec(str(tiny_image_folder(folder / "images", 24) if image else tiny_text_csv(folder)))
    plan = make_scoring_plan(model, data, ScoreSettings(method="magnitude", samples=8))
    return model, select(scoring.score(plan, folder / "r.h5"), 0.5)


@pytest.mark.parametrize(
    "name", ["timm-resnet", pytest.param("timm-efficientnet", marks=pytest.mark.slow), "timm-vgg-bn"]
)
def test_the_written_statistics_are_those_of_the_pruned_model(name, tmp_path):
    model, mask = ranked(name, tmp_path)
    plan = make_plan(model, mask, Compensation("none", batch_size=8, bn=True), at_most=True)
    small = copy.deepcopy(model.module)
    slice_model(small, model.anatomy, mask.keep)
    norms = [m for m in small.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for batch in plan.batches:
            model.task.output(small, batch.inputs)
    applied = stage.apply(model, mask, tmp_path / "out", plan=plan)
    assert applied.deviation <= 1e-4
    expected = small.state_dict()
    found = open_model(str(tmp_path / "out"), device="cpu").module.state_dict()
    assert any("running_var" in key for key in found)
    for key, value in found.items():
        if "running" in key:
            torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)


def test_statistics_are_rounded_as_they_are_stored(tmp_path):
    model, mask = ranked("timm-resnet", tmp_path)
    model.stored_dtype = torch.float16
    reestimate(model, make_plan(model, mask, Compensation("none", bn=True), at_most=True).batches)
    for key, value in model.module.state_dict().items():
        if "running" in key:
            assert torch.equal(value, value.half().float())


def test_a_model_without_norms_is_refused(tmp_path):
    model, mask = ranked("bert", tmp_path)
    with pytest.raises(UsageError, match="no BatchNorm"):
        make_plan(model, mask, Compensation(bn=True), at_most=True)


def test_the_commands_record_it(tmp_path):
    _, mask = ranked("timm-resnet", tmp_path)
    write_mask(tmp_path / "m.json", mask)

    out = tmp_path / "out"
    command = ["apply", saved_model("timm-resnet"), tmp_path / "m.json", "-o", out, "--device", "cpu"]
    run(*command, "--bn")
    assert read_pruned(out).history[-1]["compensation"]["bn"] is True
    assert "statistics of BatchNorms measured anew" in " ".join(run("inspect", out).stdout.split())
    assert json.loads(run(*command, "--bn", "--json").stdout)["reused"] is True
    other = run(*command, code=2)
    assert "another compensation" in other.stderr
    run("inspect", out, "--json")
