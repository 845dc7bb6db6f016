"""What heads have beside their projections: position biases, rotations, DeBERTa's relative positions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.brute_force import calibrate, change
from helpers.families import HEADS
from helpers.models import shared_model, tiny_model
from helpers.promises import counted_macs, masked_outputs, sliced
from helpers.pruning import rank
from helpers.runs import outputs, random_inputs

from optin_cli.architectures.resolve import dissect
from optin_cli.compensation.plan import make_plan
from optin_cli.compensation.settings import Compensation
from optin_cli.errors import InputError
from optin_cli.loading.checkpoint import open_model
from optin_cli.pruning import apply as stage
from optin_cli.scoring.methods.ablation import Ablation
from optin_cli.selection.select import select
from optin_cli.transforms.slicing import slice_model


@pytest.mark.parametrize(
    "name",
    [
        "beit",
        "beit-shared",
        "timm-eva-mixed",
        "swin",
        "swinv2",
        "timm-swin",
        "deberta",
        "deberta-v2",
        "deberta-v3",
    ],
)
def test_what_a_head_adds_to_its_scores_stays_its_own(name):
    """Sliced twice to one head, by way of two, each head must still find its own bias or rotation."""
    model = shared_model(name)
    for head in range(1, HEADS):
        keep = {"blocks.1.heads": [head]}
        module = sliced(model, {"blocks.1.heads": [0, head]})
        slice_model(module, dissect(module, model.family), {"blocks.1.heads": [1]})
        found = outputs(model, module, random_inputs(model))
        torch.testing.assert_close(found, masked_outputs(model, keep), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("deberta", {"pos_att_type": ["c2p"]}),
        ("deberta", {"pos_att_type": ["p2c"]}),
        ("deberta", {"relative_attention": False, "pos_att_type": []}),
        ("deberta", {"max_relative_positions": 4}),
        ("deberta-v2", {"pos_att_type": ["p2c"]}),
        ("deberta-v2", {"relative_attention": False, "pos_att_type": []}),
        ("deberta-v2", {"conv_kernel_size": 3, "conv_act": "gelu"}),
    ],
)
def test_variants_of_deberta(name, settings, tmp_path):
    model = open_model(str(tiny_model(name, tmp_path / "m", **settings)), device="cpu")
    keep = {site.name: list(range(site.block, site.units, 2)) for site in model.anatomy}
    keep["blocks.1.heads"] = []
    smaller = sliced(model, keep)
    found = outputs(model, smaller, random_inputs(model))
    torch.testing.assert_close(found, masked_outputs(model, keep), rtol=0, atol=1e-5)
    counted, tokens = counted_macs(model, smaller)
    macs = dissect(smaller, model.family).macs(tokens)
    if "max_relative_positions" in settings:  # fewer than twice as many as tokens
        assert counted < macs < 1.1 * counted
    else:
        assert macs == pytest.approx(counted, rel=0.01)
    calibration = calibrate(model)
    trajectory, output = Ablation(calibration, 0).score(model.anatomy["blocks.0.heads"], np.arange(HEADS))
    for unit in range(HEADS):
        expected, changed = change(calibration, model.anatomy["blocks.0.heads"], unit, 0.0)
        np.testing.assert_allclose(trajectory[unit], expected, rtol=1e-3, atol=1e-9)
        assert output[unit] == pytest.approx(changed, rel=1e-3, abs=1e-9)


def test_heads_that_talk_to_each_other_stay(tmp_path):
    model = open_model(str(tiny_model("deberta", tmp_path / "m", talking_head=True)), device="cpu")
    assert {site.kind for site in model.anatomy} == {"neurons"}


def test_what_runs_between_blocks_is_no_stream_to_refit(tmp_path):
    """DeBERTa's convolution stands between the first two blocks."""
    model = open_model(str(tiny_model("deberta-v2", tmp_path / "m", conv_kernel_size=3)), device="cpu")
    mask = select(rank(model, tmp_path), 0.5)
    plan = make_plan(model, mask, Compensation(batch_size=16), at_most=True)
    with pytest.raises(InputError, match=r"between its blocks(.|\n)*compensate='none'"):
        stage.apply(model, mask, tmp_path / "out", plan=plan)
    assert stage.apply(model, mask, tmp_path / "out").deviation <= 1e-5
