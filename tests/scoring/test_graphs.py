"""The kernel that attention is recorded with, where a CPU rounds products."""

from __future__ import annotations

import pytest
import torch
from helpers.brute_force import calibrate
from helpers.models import shared_model

from optin_cli.scoring import graphs
from optin_cli.scoring.graphs import record_graph

FUSED = "ScaledDotProductFlashAttentionForCpuBackward0"


def kernels(tensor):
    """The names of all steps of a backward pass."""
    found, left = set(), [tensor.grad_fn]
    seen = set()
    while left:
        step = left.pop()
        if step is not None and step not in seen:
            seen.add(step)
            found.add(step.name())
            left += [before for before, _ in step.next_functions]
    return found


def rounding(monkeypatch, rounds):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: rounds, raising=False)


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "timm-vit"])
def test_attention_is_plain_products_where_a_cpu_rounds_them(name, monkeypatch):
    calibration = calibrate(shared_model(name))
    model, batch = calibration.model, calibration.batch(0)
    sites, graph = list(model.anatomy), {}
    for rounds in (False, True):
        rounding(monkeypatch, rounds)
        graph[rounds] = record_graph(model, batch, sites)
        assert (FUSED in kernels(graph[rounds].output)) != rounds
    torch.testing.assert_close(graph[True].output, graph[False].output, rtol=1e-4, atol=1e-5)
    seed = torch.randn(graph[True].output.shape, generator=torch.Generator().manual_seed(0))
    one, other = (graph[r].gradients([graph[r].output], [seed], sites, reduced=False) for r in (True, False))
    for plain, fused in zip(one, other, strict=True):
        torch.testing.assert_close(plain, fused, rtol=1e-3, atol=1e-4 * float(fused.abs().max()))


def test_long_sequences_keep_the_fused_kernel(monkeypatch):
    rounding(monkeypatch, True)
    monkeypatch.setattr(graphs, "_SHORT", 4)
    calibration = calibrate(shared_model("bert"))
    assert calibration.batch(0).inputs["input_ids"].shape[1] > 4
    assert FUSED in kernels(record_graph(calibration.model, calibration.batch(0), []).output)


def test_nothing_is_left_switched(monkeypatch):
    rounding(monkeypatch, True)
    before = torch.backends.cuda.flash_sdp_enabled()
    record_graph(shared_model("bert"), calibrate(shared_model("bert")).batch(0), [])
    assert torch.backends.cuda.flash_sdp_enabled() == before is True
