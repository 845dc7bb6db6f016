"""Peak memory against sums done by hand, MACs against the anatomy, bytes on disk."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from helpers.families import ALL, IMAGE_FAMILIES, TIMM_NAME
from helpers.models import saved_model, shared_model
from helpers.runs import random_inputs
from torch import nn

from optin_cli.architectures.resolve import dissect
from optin_cli.execution.macs import count_macs, observed_tokens
from optin_cli.measure.memory import activation_peak, disk_bytes, peak_memory, weight_bytes
from optin_cli.transforms.slicing import slice_model

KB = 1024
X = torch.ones(256)  # 1 KB of float32, made outside


def test_peak_is_what_lives_at_once_not_the_sum():
    def chain():
        a = X.repeat(4)  # 4 KB live
        b = torch.cat([a, a])  # 12
        del a  # 8
        return b.sum().repeat(256)  # 9, and the sum while it lives

    assert activation_peak(chain) == 12 * KB


def test_peak_at_the_end_counts_all_that_was_never_freed():
    def pile():
        return [X + 1, X + 2, X.double()]  # 1 + 1 + 2

    assert activation_peak(pile) == 4 * KB


def test_views_in_place_ops_and_arguments_cost_nothing():
    def views():
        a = X * 2  # 1 KB: all that follows shares it, or shares X
        b = a.view(16, 16).t()[3:5]
        a.add_(1).relu_()
        return X.view(2, 128), b, a.detach()

    assert activation_peak(views) == KB


def test_a_view_keeps_its_storage_alive():
    def views():
        part = X.repeat(8)[:1]  # 8 KB stay behind one element
        other = X.repeat(2)
        return part, other

    assert activation_peak(views) == 10 * KB


def test_memory_that_is_freed_is_used_again():
    def loop():
        for _ in range(20):
            X.repeat(4)

    assert activation_peak(loop) == 4 * KB


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 64, bias=False)
        self.second = nn.Linear(64, 16, bias=False)
        self.register_buffer("scale", torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = torch.relu(x)
        return self.second(x)


def test_peak_memory_is_weights_and_the_widest_point():
    module = TwoLayers()
    model = dataclasses.replace(shared_model("bert"), module=module)
    weights = 4 * (16 * 64 + 64 * 16 + 8)
    widest = 2 * 4 * 10 * 64  # relu's input and output, 10 rows each
    assert peak_memory(model, {"x": torch.ones(10, 16)}) == weights + widest


def test_tied_weights_count_once():
    module = TwoLayers()
    before = weight_bytes(module)
    module.third = module.first
    module.fourth = nn.Linear(16, 64, bias=False)
    module.fourth.weight = nn.Parameter(module.second.weight.data)  # another parameter, the same memory
    assert weight_bytes(module) == before


def test_a_larger_batch_needs_more_activations_only():
    model = shared_model("bert")
    peaks = [peak_memory(model, random_inputs(model, batch=b)) for b in (2, 4)]
    weights = weight_bytes(model.module)
    assert weights < peaks[0] < peaks[1]
    assert peaks[1] - weights == pytest.approx(2 * (peaks[0] - weights), rel=0.05)


def test_disk_bytes_are_the_weight_files():
    folder = saved_model("bert")
    assert disk_bytes(shared_model("bert")) == (folder / "model.safetensors").stat().st_size


def test_disk_bytes_of_a_model_without_files():
    model = shared_model("bert")
    source = dataclasses.replace(model.source, folder=None, architecture=TIMM_NAME)
    assert disk_bytes(dataclasses.replace(model, source=source)) is None


@pytest.mark.parametrize("name", ALL)
def test_macs_of_sliced_models_differ_by_what_the_anatomy_says(name):
    """Only the sites change, so torch's counts differ by exactly the anatomy's MACs of the lost units."""
    model = shared_model(name)
    inputs = random_inputs(model, batch=2)
    tokens = observed_tokens(model, inputs)
    assert tokens == (17 if name in IMAGE_FAMILIES else 9) + (name == "deit")
    module = copy.deepcopy(model.module)
    slice_model(module, model.anatomy, {"blocks.0.heads": [1, 3], "blocks.2.neurons": list(range(40))})
    pruned = dataclasses.replace(model, module=module, anatomy=dissect(module, model.family))
    lost = count_macs(model, inputs) - count_macs(pruned, inputs)
    assert lost == 2 * (model.anatomy.macs(tokens) - pruned.anatomy.macs(tokens))


def test_macs_of_two_linears_by_hand():
    model = dataclasses.replace(shared_model("bert"), module=TwoLayers())
    assert count_macs(model, {"x": torch.ones(10, 16)}) == 10 * (16 * 64 + 64 * 16)


def test_a_failing_forward_leaves_no_hook_behind():
    model = shared_model("bert")
    with pytest.raises((TypeError, ValueError)):
        observed_tokens(model, {"nonsense": torch.ones(1, 2)})
    assert not model.module.get_submodule(model.anatomy.sites[0].consumer)._forward_pre_hooks
