"""Layer scales are the gain of the residual sum behind them."""

from __future__ import annotations

import pytest
import torch
from helpers.models import shared_model
from helpers.runs import random_inputs

from optin_cli.compensation.residual import find_residual_sum
from optin_cli.data.batches import Batch
from optin_cli.execution.activation_cache import ActivationCache
from optin_cli.execution.block_streams import BlockCalls

LAYER_SCALES = {
    "beit": ("lambda_1", "lambda_2"),
    "dinov2": ("layer_scale1.lambda1", "layer_scale2.lambda1"),
    "dinov2-swiglu": ("layer_scale1.lambda1", "layer_scale2.lambda1"),
    "dinov2-registers": ("layer_scale1.lambda1", "layer_scale2.lambda1"),
    "timm-deit3": ("ls1.gamma", "ls2.gamma"),
    "timm-registers": ("ls1.gamma", "ls2.gamma"),
    "timm-swiglu": ("ls1.gamma", "ls2.gamma"),
    "timm-eva-rope": ("gamma_1", "gamma_2"),
    "timm-eva-mixed": ("gamma_1", "gamma_2"),
    "timm-dinov3": ("gamma_1", "gamma_2"),
    "timm-beit": ("gamma_1", "gamma_2"),
}


@pytest.mark.parametrize("name", LAYER_SCALES)
def test_a_layer_scale_is_the_gain_of_the_residual_sum(name):
    model = shared_model(name)
    path = model.anatomy.blocks[1]
    block = model.module.get_submodule(path)
    inputs = random_inputs(model)
    with ActivationCache(1 << 30) as store:
        calls = BlockCalls(model, store)
        arguments = calls.arguments(1, 0, calls.record(0, Batch(inputs, None, [0, 1, 2])))
    for site in model.anatomy.in_block(1):
        scale = block.get_parameter(LAYER_SCALES[name][site.kind == "neurons"]).detach()
        assert float(scale.std()) > 0.01
        point = find_residual_sum(block, site.consumer.removeprefix(f"{path}."), arguments)
        assert point.found
        torch.testing.assert_close(point.gain.float(), scale, rtol=1e-4, atol=1e-6)
