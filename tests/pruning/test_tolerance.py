"""The check of sliced against masked, in every dtype that computes."""

from __future__ import annotations

import pytest
import torch
from helpers.models import in_dtype, saved_model
from helpers.pruning import data_for, rank

from optin_cli.artefacts.pruned import read_pruned
from optin_cli.compensation.plan import make_plan
from optin_cli.compensation.settings import Compensation
from optin_cli.errors import OptinError
from optin_cli.loading.checkpoint import open_model
from optin_cli.pruning import apply as stage
from optin_cli.pruning import writers
from optin_cli.pruning.tolerance import TOLERANCES, tolerance
from optin_cli.selection.select import select


def test_a_tolerance_is_a_share_of_the_largest_output_or_of_one():
    outputs = [torch.tensor([[0.2, -0.5]]), torch.tensor([[-8.0]])]
    assert tolerance(torch.float32, outputs[:1]) == 1e-4
    assert tolerance(torch.float32, outputs) == pytest.approx(8e-4)
    assert tolerance(torch.bfloat16, outputs) == pytest.approx(0.4)
    assert tolerance(torch.float16, []) == TOLERANCES[torch.float16]


def applied(folder, dtype: str):
    """A bfloat16 BERT pruned with compensation, `dtype` computing."""
    source = in_dtype(saved_model("bert"), folder / "source", "bfloat16")
    mask = select(rank(open_model(str(source), device="cpu"), folder), 0.5)
    model = open_model(str(source), device="cpu", dtype=dtype)
    plan = make_plan(model, mask, Compensation(samples=60, batch_size=8), data_for(model))
    return stage.apply(model, mask, folder / "out", plan=plan)


def test_bfloat16_passes_its_own_tolerance_which_is_recorded(tmp_path):
    found = applied(tmp_path, "bfloat16")
    assert found.deviation <= found.tolerance
    assert found.tolerance >= 5e-2
    assert read_pruned(tmp_path / "out").history[-1]["tolerance"] == found.tolerance
    assert open_model(str(tmp_path / "out"), device="cpu").stored_dtype == torch.bfloat16


def test_compensation_in_bfloat16_gains_as_much_as_in_float32(tmp_path):
    fits = {}
    for dtype in ("float32", "bfloat16"):
        (tmp_path / dtype).mkdir()
        fits[dtype] = applied(tmp_path / dtype, dtype).fits
    for exact, rounded in zip(fits["float32"], fits["bfloat16"], strict=True):
        assert rounded.layer == exact.layer
        assert rounded.after == pytest.approx(exact.after, rel=0.2, abs=0.01)


def test_a_deviation_beyond_the_tolerance_names_the_dtype(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "tolerance", lambda *_: -1.0)
    with pytest.raises(OptinError, match="that bfloat16 explains"):
        applied(tmp_path, "bfloat16")
    assert not (tmp_path / "out").exists()
