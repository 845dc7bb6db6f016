"""Compensation of convolutions and of the norms behind them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.compensation import FULL, batches_for, copied, outputs
from helpers.models import shared_model

from optin_cli.compensation.compensate import compensate
from optin_cli.compensation.settings import Compensation
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.standalone.empty_layers import output_size
from optin_cli.structure.layers import matrix, patches


def with_a_double(model: OpenModel, name: str) -> OpenModel:
    """A copy whose unit 1 of a site of channels does what unit 0 does."""
    twin = copied(model)
    site = twin.anatomy[name]
    for path in (*(producer.path for producer in site.producers), *site.carried):
        layer = twin.module.get_submodule(path)
        for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
            if tensor.dim():
                tensor.data[1] = tensor.data[0]
    for path in site.readers:  # no refit of the consumer could change what a squeeze-and-excite reads
        twin.module.get_submodule(path).weight.data[:, 1] = 0
    return twin


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("timm-resnet", "blocks.0.channels"),
        pytest.param("timm-resnet", "blocks.2.channels2", marks=pytest.mark.slow),
        pytest.param("timm-efficientnet", "blocks.1.channels", marks=pytest.mark.slow),
        pytest.param("timm-efficientnet", "blocks.3.channels", marks=pytest.mark.slow),
    ],
)
def test_full_restores_a_duplicate_channel(family, name):
    model = with_a_double(shared_model(family), name)
    batches = batches_for(model, 200)
    keep = {name: [unit for unit in range(model.anatomy[name].units) if unit != 1]}
    dense = outputs(model, {}, batches)
    assert (outputs(model, keep, batches) - dense).abs().max() > 1e-3
    settings = dataclasses.replace(FULL, ridges=(1e-10,))
    (fit,) = [fit for fit in compensate(model, keep, batches, settings) if fit.site == name]
    assert fit.method == "full"
    assert fit.after < 1e-8
    torch.testing.assert_close(outputs(model, keep, batches), dense, rtol=0, atol=1e-5)


def test_the_norm_behind_a_convolution_takes_up_its_bias():
    """Oracle: the mean of what the sum lacks, by full forward passes."""
    model = copied(shared_model("timm-resnet"))
    site = model.anatomy["blocks.1.channels"]
    batches = batches_for(model, 48)
    keep = {site.name: list(range(site.units // 2))}
    block = model.module.get_submodule(model.anatomy.blocks[1])
    norm = model.module.get_submodule(site.norm)

    def mean_after_norm(kept) -> torch.Tensor:
        found = []
        handle = norm.register_forward_hook(lambda _, __, output: found.append(output.mean((2, 3))))
        outputs(model, kept, batches)
        handle.remove()
        return torch.cat(found).mean(0)

    wanted, before = mean_after_norm({}), norm.bias.clone()
    weights = block.conv2.weight.clone()
    compensate(model, keep, batches, Compensation(method="bias", batch_size=16))
    assert not torch.equal(norm.bias, before)
    assert torch.equal(block.conv2.weight, weights)
    lacking, left = (wanted - mean_after_norm({**keep})), norm.bias - before
    assert float(lacking.norm()) < 0.5 * float(left.norm())


def test_rows_of_a_convolution_are_its_input_patches():
    """Oracle: the convolution itself, for odd strides, paddings and dilations."""
    from timm.layers import Conv2dSame

    torch.manual_seed(0)
    for layer in (
        torch.nn.Conv2d(3, 5, 3, stride=2, padding=1),
        torch.nn.Conv2d(3, 5, (3, 2), padding=(2, 0), dilation=2, bias=False),
        torch.nn.Conv2d(3, 5, 1, stride=2),
        Conv2dSame(3, 5, 3, stride=2),
        torch.nn.Conv2d(3, 5, 5, padding="same"),
    ):
        x = torch.randn(2, 3, 11, 8)
        expected = layer(x)
        found = patches(layer, x) @ matrix(layer).T
        found = found + (0 if layer.bias is None else layer.bias)
        torch.testing.assert_close(found, expected.flatten(2).mT)
        assert output_size(layer, (11, 8)) == tuple(expected.shape[2:])
