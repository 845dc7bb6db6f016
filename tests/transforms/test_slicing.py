"""Slicing against its oracles: the masked dense model, torch's FLOP counter, and counting parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.artefacts import keep_sets, kept_of
from helpers.families import ALL, TEXT_FAMILIES
from helpers.flops import flop_counter
from helpers.models import new_timm_vit, shared_model
from helpers.runs import examples, outputs, random_inputs
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from optin_cli.architectures.families import Family, SiteTable
from optin_cli.architectures.resolve import dissect, family_of
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.standalone.unit_inputs import select_unit_input
from optin_cli.structure.anatomy import Anatomy, Producer
from optin_cli.transforms.masking import masked, masks_from_keep
from optin_cli.transforms.slicing import slice_model


def sliced(model: OpenModel, keep: dict[str, list[int]]) -> nn.Module:
    module = copy.deepcopy(model.module)
    slice_model(module, model.anatomy, keep)
    return module


def assert_sliced_is_masked(model: OpenModel, keep: dict[str, list[int]]) -> None:
    inputs = random_inputs(model)
    with masked(model.module, model.anatomy, masks_from_keep(model.anatomy, keep)):
        expected = outputs(model, model.module, inputs)
    torch.testing.assert_close(outputs(model, sliced(model, keep), inputs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
@examples(25)
@given(data=st.data())
def test_sliced_model_computes_what_the_masked_model_does(name, data):
    model = shared_model(name)
    assert_sliced_is_masked(model, data.draw(keep_sets(model.anatomy)))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kept", [[], [1]], ids=["none", "one"])
def test_sites_with_no_unit_or_one_unit_left_work(name, kept):
    model = shared_model(name)
    assert_sliced_is_masked(model, {site.name: kept for site in model.anatomy})


@pytest.mark.parametrize("head", ["encoder", "tagger", "reader"])
@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_every_task_head_works_on_a_sliced_encoder(name, head):
    model = shared_model(name, head)
    keep = {site.name: list(range(1, site.units, 2)) for site in model.anatomy}
    assert_sliced_is_masked(model, keep)


def test_heads_with_a_norm_of_their_own_are_sliced_right():
    module = new_timm_vit(qk_norm=True)
    anatomy = dissect(module, family_of(module))
    keep = {site.name: [0, 2] for site in anatomy}
    smaller = copy.deepcopy(module)
    slice_model(smaller, anatomy, keep)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), masked(module, anatomy, masks_from_keep(anatomy, keep)):
        expected = module(images)
    with torch.no_grad():
        torch.testing.assert_close(smaller(images), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_each_unit_changes_the_output(name):
    """Otherwise masked == sliced could hold for a mask that does nothing."""
    model = shared_model(name)
    inputs = random_inputs(model)
    dense = outputs(model, model.module, inputs)
    for site in model.anatomy:
        keep = {site.name: list(range(1, site.units))}
        changed = outputs(model, sliced(model, keep), inputs)
        assert (changed - dense).abs().max() > 1e-4, site.name


@pytest.mark.parametrize("name", ALL)
@examples(15)
@given(data=st.data())
def test_pruning_twice_is_pruning_once_with_composed_indices(name, data):
    model = shared_model(name)
    first = data.draw(keep_sets(model.anatomy))
    twice = sliced(model, first)
    anatomy = dissect(twice, model.family)
    second = {site.name: data.draw(kept_of(site.units), label=site.name) for site in anatomy}
    slice_model(twice, anatomy, second)

    whole = {site.name: list(range(site.units)) for site in model.anatomy}
    composed = {site: [{**whole, **first}[site][i] for i in indices] for site, indices in second.items()}
    once = sliced(model, composed)

    inputs = random_inputs(model)
    assert_same_weights(twice, once)
    assert torch.equal(outputs(model, twice, inputs), outputs(model, once, inputs))


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    assert [key for key in left if not torch.equal(left[key], right[key])] == []


@pytest.mark.parametrize("name", ALL)
def test_keeping_every_unit_changes_no_weight(name):
    model = shared_model(name)
    keep = {site.name: list(range(site.units)) for site in model.anatomy}
    assert_same_weights(sliced(model, keep), model.module)


@pytest.mark.parametrize("name", ALL)
@examples(10)
@given(data=st.data())
def test_a_sliced_model_dissects_into_the_kept_units(name, data):
    model = shared_model(name)
    keep = data.draw(keep_sets(model.anatomy))
    after = dissect(sliced(model, keep), model.family)
    assert {site.name: site.units for site in after} == {
        site.name: len(keep.get(site.name, range(site.units))) for site in model.anatomy
    }


@pytest.mark.parametrize("name", ALL)
@examples(8)
@given(data=st.data())
def test_macs_of_the_blocks_are_what_torch_counts(name, data):
    model = shared_model(name)
    keep = data.draw(keep_sets(model.anatomy))
    module = sliced(model, keep)
    anatomy = dissect(module, model.family)
    counted, tokens = counted_macs_per_example(model, module, anatomy)
    assert anatomy.macs(tokens) == pytest.approx(counted, rel=0.01)
    kept = {site.name: len(keep.get(site.name, range(site.units))) for site in model.anatomy}
    assert model.anatomy.macs(tokens, kept) == anatomy.macs(tokens)


def counted_macs_per_example(model: OpenModel, module: nn.Module, anatomy: Anatomy) -> tuple[float, int]:
    """(MACs of the blocks by torch's FLOP counter, tokens that the blocks see), for one example."""
    shapes: list[torch.Size] = []
    block = module.get_submodule(anatomy.blocks[0])
    handle = block.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    with torch.no_grad(), flop_counter() as counter:
        module(**random_inputs(model, batch=2))
    handle.remove()
    flops = counter.get_flop_counts()
    total = sum(sum(flops.get(f"{type(module).__name__}.{path}", {}).values()) for path in anatomy.blocks)
    batch, tokens, _ = shapes[0]
    return total / 2 / batch, tokens


@pytest.mark.parametrize("name", ALL)
@examples(8)
@given(data=st.data())
def test_params_per_unit_is_what_slicing_removes(name, data):
    model = shared_model(name)
    keep = data.draw(keep_sets(model.anatomy))
    removed = sum(
        (site.units - len(keep[site.name])) * site.params_per_unit
        for site in model.anatomy
        if site.name in keep
    )
    assert parameters(sliced(model, keep)) == parameters(model.module) - removed


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", ALL)
def test_a_skeleton_without_weights_gets_the_same_shapes(name):
    model = shared_model(name)
    keep = {site.name: list(range(0, site.units, 3)) for site in model.anatomy}
    skeleton = copy.deepcopy(model.module).to("meta")
    slice_model(skeleton, model.anatomy, keep)
    expected = {key: value.shape for key, value in sliced(model, keep).state_dict().items()}
    assert {key: value.shape for key, value in skeleton.state_dict().items()} == expected


@pytest.mark.parametrize("name", ALL)
def test_linear_layers_report_their_new_sizes(name):
    model = shared_model(name)
    module = sliced(model, {site.name: [0] for site in model.anatomy})
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            assert (layer.out_features, layer.in_features) == tuple(layer.weight.shape)


@pytest.mark.parametrize("trainable", [True, False])
def test_slicing_keeps_whether_weights_are_trainable(trainable):
    model = shared_model("bert")
    module = copy.deepcopy(model.module).requires_grad_(trainable)
    slice_model(module, model.anatomy, {site.name: [0] for site in model.anatomy})
    assert {p.requires_grad for p in module.parameters()} == {trainable}


@pytest.mark.parametrize("shape", [(5, 6), (1, 5, 6)], ids=["no axis", "broadcast"])
def test_an_argument_that_all_units_share_is_left_alone(shape):
    class Block(nn.Module):
        def forward(self, bias):
            return bias

    block, bias = Block(), torch.randn(shape)
    select_unit_input(block, argument="bias", axis=-3, units=[0, 2], returned=0, maker="")
    assert block(bias) is bias
    each = torch.randn(4, 5, 6)
    assert torch.equal(block(bias=each), each[[0, 2]])


def test_an_unknown_site_is_refused():
    model = shared_model("bert")
    with pytest.raises(KeyError, match=r"blocks\.9\.heads"):
        sliced(model, {"blocks.9.heads": [0]})


# heads that bring a table of their own, and attention that can't run without heads


@pytest.mark.parametrize(
    ("name", "module", "shape"),
    [
        ("swin", "attention.relative_position_bias.relative_position_bias_table", (49, 2)),
        ("swinv2", "attention.self.continuous_position_bias_mlp.2.weight", (2, 512)),
        ("swinv2", "attention.self.logit_scale", (2, 1, 1)),
        ("timm-swin", "attn.relative_position_bias_table", (49, 2)),
    ],
)
def test_tensors_with_a_slice_a_head_keep_those_of_the_heads_that_stay(name, module, shape):
    model = shared_model(name)
    path = f"{model.anatomy.blocks[1]}.{module}"
    dense = model.module.get_parameter(path)
    found = sliced(model, {"blocks.1.heads": [1, 3]}).get_parameter(path)
    assert tuple(found.shape) == shape
    axis = shape.index(2)
    assert torch.equal(found, dense.index_select(axis, torch.tensor([1, 3])))


@pytest.mark.parametrize("name", ["swinv2", "timm-swin"])
def test_a_copy_of_an_emptied_attention_gives_its_own_bias(name):
    model = shared_model(name)
    module = sliced(model, {"blocks.0.heads": []})
    before = outputs(model, module, random_inputs(model))
    twin = copy.deepcopy(module)
    with torch.no_grad():
        module.get_submodule(model.anatomy["blocks.0.heads"].consumer).bias.add_(1)
    assert torch.equal(outputs(model, twin, random_inputs(model)), before)
    assert not torch.equal(outputs(model, module, random_inputs(model)), before)


def test_a_buffer_is_sliced_and_stays_one():
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(4, 6), "down": nn.Linear(6, 4)})])
            self.layers[0].register_buffer("scale", torch.arange(6.0))

    table = SiteTable("neurons", (Producer("up"),), "down", tensors={"scale": 0})
    family = Family("biased", ("Biased",), "layers", (table,))
    module = Biased()
    anatomy = dissect(module, family)
    assert anatomy.sites[0].params_per_unit == 4 + 1 + 4  # a buffer is no parameter
    slice_model(module, anatomy, {"blocks.0.neurons": [0, 5]})
    assert dict(module.named_buffers())["layers.0.scale"].tolist() == [0, 5]
