"""`apply` and compensation on a GPU against the CPU, in every precision."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers.compensation import half
from helpers.memory import pixels, words
from helpers.models import in_dtype, saved_model
from helpers.runs import random_inputs

from optin_cli.artefacts.pruned import read_pruned
from optin_cli.compensation.batch_norm import batch_norms, reestimate
from optin_cli.compensation.compensate import compensate
from optin_cli.compensation.plan import make_plan
from optin_cli.compensation.settings import Compensation
from optin_cli.execution.activation_cache import ActivationCache
from optin_cli.execution.precision import exact_convolutions
from optin_cli.loading.checkpoint import open_model
from optin_cli.pruning.apply import apply
from optin_cli.scoring.plan import ScoreSettings
from optin_cli.scoring.plan import make_plan as make_scoring
from optin_cli.scoring.score import score
from optin_cli.selection.select import select
from optin_cli.transforms.masking import masked, masks_from_keep
from optin_cli.transforms.slicing import slice_model

pytestmark = pytest.mark.cuda

ROWS = words(64, 20)
FITTED = Compensation(samples=64, batch_size=8)


def mask_for(source, folder):
    plan = make_scoring(open_model(str(source), device="cpu"), ROWS, ScoreSettings(samples=16, batch_size=8))
    return select(score(plan, folder / "r.h5"), 0.6)


def applied(source, mask, output, device: str, dtype: str = "float32"):
    model = open_model(str(source), device=device, dtype=dtype)
    return apply(model, mask, output, plan=make_plan(model, mask, FITTED, ROWS))


def on_the_cpu(folder) -> torch.Tensor:
    model = open_model(str(folder), device="cpu", dtype="float32")
    with torch.inference_mode():
        return model.output(random_inputs(model))


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_compensation_is_that_of_the_cpu(name, device, tmp_path):
    source = saved_model(name)
    mask = mask_for(source, tmp_path)
    ours = applied(source, mask, tmp_path / "ours", device)
    theirs = applied(source, mask, tmp_path / "theirs", "cpu")
    assert ours.deviation <= ours.tolerance
    for one, two in zip(ours.fits, theirs.fits, strict=True):
        assert (one.site, one.layer) == (two.site, two.layer)
        assert one.after == pytest.approx(two.after, rel=0.02, abs=1e-6)
    torch.testing.assert_close(on_the_cpu(ours.path), on_the_cpu(theirs.path), rtol=0, atol=5e-3)


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "float16"])
def test_half_precision_checkpoints_are_compensated(compute, device, tmp_path):
    """In the dtype that computes, sliced equals masked to what its rounding explains; and errors fall as much."""
    stored = "float16" if compute == "float16" else "bfloat16"
    source = in_dtype(saved_model("bert"), tmp_path / "half", stored)
    mask = mask_for(source, tmp_path)
    found = applied(source, mask, tmp_path / compute, device, compute)
    assert found.deviation <= found.tolerance
    assert read_pruned(tmp_path / compute).history[-1]["tolerance"] == found.tolerance
    assert open_model(str(tmp_path / compute), device="cpu").stored_dtype == getattr(torch, stored)
    exact = applied(source, mask, tmp_path / "exact", "cpu")
    for one, two in zip(found.fits, exact.fits, strict=True):
        assert one.after == pytest.approx(two.after, rel=0.2, abs=0.01)


@pytest.mark.parametrize("name", ["vit", "swin", "timm-resnet", "timm-vit"])
def test_sliced_images_equal_masked_ones(name, device):
    """A CNN too: kernels for another number of channels give the same digits where TF32 is off."""
    model = open_model(str(saved_model(name)), device=device, dtype="float32")
    keep = half(model)
    inputs = {key: value.to(device) for key, value in random_inputs(model).items()}
    with torch.inference_mode(), exact_convolutions():
        with masked(model.module, model.anatomy, masks_from_keep(model.anatomy, keep, device)):
            expected = model.output(inputs)
        sliced = copy.deepcopy(model.module)
        slice_model(sliced, model.anatomy, keep)
        close = 1e-4 * float(expected.abs().max())
        torch.testing.assert_close(model.output(inputs, sliced), expected, rtol=0, atol=close)


def test_a_cnn_is_compensated_like_on_the_cpu(device):
    found = []
    for where in (device, "cpu"):
        model = open_model(str(saved_model("timm-resnet")), device=where, dtype="float32")
        fits = compensate(model, half(model), pixels(model, 24, batch_size=8), Compensation(batch_size=8))
        reestimate(model, pixels(model, 24, batch_size=8), half(model))
        found.append((fits, [norm.running_var.cpu() for norm in batch_norms(model.module)]))
    for one, two in zip(found[0][0], found[1][0], strict=True):
        assert (one.layer, one.note) == (two.layer, two.note)
        assert one.after == pytest.approx(two.after, rel=0.05, abs=1e-4)
    for one, two in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, two, rtol=0.05, atol=1e-3)


def test_activations_stay_on_the_gpu_while_there_is_room(gpu):
    tensor = torch.arange(1000.0, device=gpu)
    with ActivationCache(memory=4000, on_gpu=8000) as store:
        for key in range(4):
            store[key] = tensor + key
        assert [store[key].device.type for key in range(4)] == ["cuda", "cuda", "cpu", "cpu"]
        assert len(store.spilled) == 1  # two on the GPU, one in main memory, one on disk
        for key in range(4):
            torch.testing.assert_close(store.pop(key).cpu(), tensor.cpu() + key)
        assert (store.used, store.used_on_gpu) == (0, 0)


def test_errors_fall(device, tmp_path):
    source = saved_model("bert")
    found = applied(source, mask_for(source, tmp_path), tmp_path / "out", device)
    errors = np.array([(fit.before, fit.after) for fit in found.fits if fit.method != "none"])
    assert len(errors)
    assert (errors[:, 1] <= errors[:, 0]).all()
