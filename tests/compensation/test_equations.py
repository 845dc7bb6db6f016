"""Layers that read the same tensor share the sums over it: each one gets what its own equations give."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from optin_cli.compensation.equations import Equations, Fitted
from optin_cli.compensation.settings import Compensation

CPU = torch.device("cpu")


def target(name: str, outputs: int) -> Fitted:
    return Fitted(name=name, path=name, where="block 0", gain=torch.ones(outputs, dtype=torch.float64))


@pytest.mark.parametrize("ridges", [(1e-2, 1.0), (1e-6, 1e-3)], ids=["float32", "float64"])
def test_shared_sums_fit_each_layer_as_its_own(ridges):
    generator = torch.Generator().manual_seed(0)
    settings = dataclasses.replace(Compensation(), ridges=ridges)
    layers = [nn.Linear(12, outputs, bias=outputs != 5) for outputs in (7, 5, 3)]
    targets = [target(name, layer.out_features) for name, layer in zip("qkv", layers, strict=True)]
    together = Equations(layers, targets, CPU, settings)
    apart = [Equations([one], [to], CPU, settings) for one, to in zip(layers, targets, strict=True)]
    for index in range(4):
        x = torch.randn(8, 20, 12, generator=generator)
        dense = [torch.randn(8, 20, layer.out_features, generator=generator) for layer in layers]
        # the third layer lacks nothing that x explains
        errors = [dense[0] + x[..., :7], dense[1] * 0.1 + x[..., :5], dense[2]]
        weight = (torch.rand(8, 20, generator=generator) > 0.2).float()
        held_out = torch.full((8, 20), index == 3)
        together.add(x, errors, weight, dense, held_out)
        for own, error, values in zip(apart, errors, dense, strict=True):
            own.add(x, [error], weight, [values], held_out)
    found, expected = together.solve(), [own.solve()[0] for own in apart]
    assert [fit.layer for _, fit in found] == ["q", "k", "v"]
    for (change, fit), (own_change, own_fit) in zip(found, expected, strict=True):
        assert (fit.method, fit.ridge, fit.rows, fit.note) == (
            own_fit.method, own_fit.ridge, own_fit.rows, own_fit.note,
        )  # fmt: skip
        assert (fit.before, fit.after) == pytest.approx((own_fit.before, own_fit.after), rel=1e-6)
        torch.testing.assert_close(change.weight, own_change.weight, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(change.bias, own_change.bias, rtol=1e-4, atol=1e-6)
    assert found[0][1].method == "full" and found[0][1].after < 0.7 * found[0][1].before
