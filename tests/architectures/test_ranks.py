"""Heads at a lower rank, family by family: turned models compute what they did, and cut ones what masked ones do."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from helpers.families import RANKED, UNSAID, WHOLE
from helpers.models import shared_model
from helpers.runs import outputs, random_inputs

from optin_cli.architectures.resolve import dissect
from optin_cli.data.batches import Batch
from optin_cli.errors import InputError
from optin_cli.execution.rotation import check_rankable, rankable, with_turned_heads
from optin_cli.transforms.masking import masked, masks_from_keep
from optin_cli.transforms.slicing import slice_model


class Few:
    """Batches of random inputs, padding among them where a model takes it."""

    def __init__(self, model):
        self.inputs = [random_inputs(model, seed=seed) for seed in range(2)]
        self.count = sum(len(next(iter(one.values()))) for one in self.inputs)

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        inputs = self.inputs[index]
        mask = inputs.get("attention_mask")
        return Batch(
            inputs, None if mask is None else mask.bool(), list(range(len(next(iter(inputs.values())))))
        )


def turned(name):
    model = shared_model(name)
    return model, with_turned_heads(model, Few(model))


@pytest.mark.parametrize("name", sorted(WHOLE | UNSAID))
def test_heads_that_allow_no_other_basis_stay_whole(name):
    with pytest.raises(InputError, match="no heads that can be cut to a lower rank"):
        check_rankable(shared_model(name))


@pytest.mark.parametrize("name", RANKED)
def test_turning_heads_changes_nothing_and_cutting_them_what_masking_does(name):
    model, other = turned(name)
    inputs = random_inputs(model, seed=7)
    expected = outputs(model, model.module, inputs)
    torch.testing.assert_close(outputs(model, other.module, inputs), expected, rtol=0, atol=1e-5)

    ranks = {site.name: max(1, site.width // 2) for site in rankable(model)[::2]}
    keep = {site.name: list(range(site.block % 2, site.units)) for site in model.anatomy}
    anatomy = model.anatomy.cut(ranks)
    with masked(other.module, anatomy, masks_from_keep(anatomy, keep)):
        wanted = outputs(model, other.module, inputs)
    assert (wanted - expected).abs().max() > 1e-4
    smaller = copy.deepcopy(other.module)
    slice_model(smaller, anatomy, keep)
    torch.testing.assert_close(outputs(model, smaller, inputs), wanted, rtol=0, atol=1e-5)
    after = {site.name: site for site in dissect(smaller, model.family)}
    for site in model.anatomy:
        assert (after[site.name].units, after[site.name].width) == (
            len(keep[site.name]), ranks.get(site.name, site.width)
        )  # fmt: skip


def test_a_scale_that_its_class_would_not_compute_stays():
    """Of a model that was cut before, when scales were left as they were built."""
    model = shared_model("vit")
    odd = replace(model, module=copy.deepcopy(model.module))
    for site in odd.anatomy:
        if site.kind == "heads":
            odd.module.get_submodule(site.consumer.rpartition(".")[0]).scaling *= 1.7
    other, inputs = with_turned_heads(odd, Few(odd)), random_inputs(odd, seed=7)
    anatomy = odd.anatomy.cut({site.name: 4 for site in rankable(odd)})
    keep = {site.name: list(range(site.units)) for site in odd.anatomy}
    with masked(other.module, anatomy, masks_from_keep(anatomy, keep)):
        wanted = outputs(odd, other.module, inputs)
    slice_model(other.module, anatomy, keep)
    torch.testing.assert_close(outputs(odd, other.module, inputs), wanted, rtol=0, atol=1e-5)
