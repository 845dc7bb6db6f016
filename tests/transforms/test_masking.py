"""Masks on a live model: what they stop, that gradients reach them, and that nothing stays behind."""

from __future__ import annotations

import pytest
import torch
from helpers.families import ALL
from helpers.models import shared_model
from helpers.runs import outputs, random_inputs

from optin_cli.transforms.masking import masked, masks_from_keep


def test_kept_indices_become_ones():
    masks = masks_from_keep(shared_model("bert").anatomy, {"blocks.0.heads": [0, 3], "blocks.1.heads": []})
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        "blocks.0.heads": [1, 0, 0, 1],
        "blocks.1.heads": [0, 0, 0, 0],
    }


@pytest.mark.parametrize("name", ALL)
def test_masks_of_ones_change_nothing(name):
    model = shared_model(name)
    inputs = random_inputs(model)
    with masked(model.module, model.anatomy, {s.name: torch.ones(s.units) for s in model.anatomy}):
        same = outputs(model, model.module, inputs)
    assert torch.equal(same, outputs(model, model.module, inputs))


@pytest.mark.parametrize("name", ALL)
def test_a_masked_unit_no_longer_depends_on_its_own_weights(name):
    """Only the masked units: another one's weights still count."""
    model = shared_model(name)
    inputs = random_inputs(model)
    for site in model.anatomy.in_block(1):
        consumer = model.module.get_submodule(site.consumer).weight
        masks = masks_from_keep(model.anatomy, {site.name: list(range(1, site.units))})
        with masked(model.module, model.anatomy, masks):
            before = outputs(model, model.module, inputs)
            after = [with_noise(model, consumer, unit, site.width, inputs) for unit in (0, 1)]
        assert torch.equal(before, after[0])
        assert not torch.equal(before, after[1])


def with_noise(model, weight: torch.Tensor, unit: int, width: int, inputs) -> torch.Tensor:
    """The output after the unit's columns of the consumer were replaced for a moment."""
    original = weight.data.clone()
    weight.data[:, unit * width : (unit + 1) * width] = 7.0
    try:
        return outputs(model, model.module, inputs)
    finally:
        weight.data.copy_(original)


@pytest.mark.parametrize("name", ALL)
def test_gradients_reach_every_mask_and_no_weight(name):
    model = shared_model(name)
    masks = {site.name: torch.ones(site.units, requires_grad=True) for site in model.anatomy}
    with masked(model.module, model.anatomy, masks):
        model.output(random_inputs(model)).square().sum().backward()
    for name_, mask in masks.items():
        assert (mask.grad != 0).any(), name_
    assert all(p.grad is None for p in model.module.parameters())


def test_the_model_is_whole_again_after_the_context_even_after_an_error():
    model = shared_model("bert")
    inputs = random_inputs(model)
    before = outputs(model, model.module, inputs)
    masks = masks_from_keep(model.anatomy, {site.name: [] for site in model.anatomy})
    with pytest.raises(RuntimeError, match="inside"), masked(model.module, model.anatomy, masks):
        assert not torch.equal(outputs(model, model.module, inputs), before)
        raise RuntimeError("inside")
    assert torch.equal(outputs(model, model.module, inputs), before)


@pytest.mark.parametrize("shape", [(3,), (5,), (1, 4), ()])
def test_a_mask_of_the_wrong_shape_is_refused_and_leaves_no_other_mask_behind(shape):
    model = shared_model("bert")
    inputs = random_inputs(model)
    before = outputs(model, model.module, inputs)
    masks = {"blocks.0.neurons": torch.zeros(64), "blocks.0.heads": torch.zeros(shape)}
    with (
        pytest.raises(ValueError, match=r"blocks\.0\.heads.*4 units"),
        masked(model.module, model.anatomy, masks),
    ):
        pass
    assert torch.equal(outputs(model, model.module, inputs), before)
