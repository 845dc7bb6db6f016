"""Anatomies read off live models: the promised sites, sizes counted from the modules, and refusals."""

from __future__ import annotations

import doctest

import pytest
import torch
from helpers.families import ALL, BLOCKS, HEADS
from helpers.models import new_timm, new_timm_vit, shared_model
from torch import nn

from optin_cli.architectures.families import DOCS
from optin_cli.architectures.resolve import dissect, family_of
from optin_cli.errors import InputError
from optin_cli.structure.anatomy import Anatomy, Site


@pytest.mark.parametrize("name", ALL)
def test_three_blocks_hold_a_site_of_heads_and_one_of_neurons_each(name):
    anatomy = shared_model(name).anatomy
    assert len(anatomy.blocks) == BLOCKS
    assert [site.name for site in anatomy] == [
        f"blocks.{block}.{kind}" for block in range(BLOCKS) for kind in ("heads", "neurons")
    ]


@pytest.mark.parametrize("name", ALL)
def test_units_are_the_heads_and_neurons_of_the_config(name):
    model = shared_model(name)
    config = getattr(model.module, "config", None)
    hidden = 48 if config is None else config.hidden_size
    inner = 96 if config is None else getattr(config, "intermediate_size", None) or config.hidden_dim
    for site in model.anatomy:
        expected = (HEADS, hidden // HEADS) if site.kind == "heads" else (inner, 1)
        assert (site.units, site.width) == expected


@pytest.mark.parametrize("name", ALL)
def test_blocks_are_modules_that_hold_their_sites(name):
    model = shared_model(name)
    for index, path in enumerate(model.anatomy.blocks):
        assert isinstance(model.module.get_submodule(path), nn.Module)
        for site in model.anatomy.in_block(index):
            assert all(p.startswith(f"{path}.") for p in (site.consumer, *(x.path for x in site.producers)))


@pytest.mark.parametrize("name", ALL)
def test_macs_per_token_are_the_weights_of_all_linear_layers_of_the_block(name):
    model = shared_model(name)
    for index, path in enumerate(model.anatomy.blocks):
        weights = sum(layer.weight.numel() for layer in linear_layers(model.module.get_submodule(path)))
        sites = model.anatomy.in_block(index)
        assert sum(site.units * site.macs_per_token for site in sites) == weights


@pytest.mark.parametrize("name", ALL)
def test_params_are_those_of_the_linear_layers_but_for_the_biases_that_outlive_all_units(name):
    model = shared_model(name)
    for index, path in enumerate(model.anatomy.blocks):
        block = model.module.get_submodule(path)
        parameters = sum(p.numel() for layer in linear_layers(block) for p in layer.parameters())
        sites = model.anatomy.in_block(index)
        staying = sum(model.module.get_submodule(site.consumer).bias.numel() for site in sites)
        assert sum(site.units * site.params_per_unit for site in sites) == parameters - staying


def linear_layers(block: nn.Module) -> list[nn.Linear]:
    return [module for module in block.modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("name", ALL)
def test_only_heads_cost_macs_for_each_pair_of_tokens(name):
    """One dot product of head_dim for the score and one row of the context."""
    for site in shared_model(name).anatomy:
        assert site.macs_per_pair == (2 * site.width if site.kind == "heads" else 0)


def test_layers_without_a_bias_have_fewer_params_but_the_same_macs():
    with_bias, without = (dissect(m, family_of(m)) for m in (new_timm_vit(), new_timm_vit(qkv_bias=False)))
    for one, other in zip(with_bias, without, strict=True):
        assert one.macs_per_token == other.macs_per_token
        fewer = 3 * one.width if one.kind == "heads" else 0
        assert one.params_per_unit - other.params_per_unit == fewer


def test_a_task_head_changes_only_the_paths():
    bare, headed = shared_model("bert", "encoder").anatomy, shared_model("bert").anatomy
    assert bare.blocks[0] == "encoder.layer.0"
    assert headed.blocks[0] == "bert.encoder.layer.0"
    assert [s.macs_per_token for s in bare] == [s.macs_per_token for s in headed]


def test_a_model_on_the_meta_device_has_the_same_anatomy():
    model = shared_model("mpnet")
    with torch.device("meta"):
        skeleton = type(model.module)(model.module.config)
    assert dissect(skeleton, model.family) == model.anatomy


def test_macs_grow_with_kept_units_tokens_and_pairs():
    anatomy = shared_model("bert").anatomy
    heads, neurons = anatomy["blocks.0.heads"], anatomy["blocks.1.neurons"]
    none = {site.name: 0 for site in anatomy}
    assert anatomy.macs(10, none) == 0
    assert anatomy.macs(10, {**none, heads.name: 3}) == 3 * (
        heads.macs_per_token * 10 + heads.macs_per_pair * 100
    )
    assert anatomy.macs(10, {**none, neurons.name: 5}) == 5 * neurons.macs_per_token * 10


def test_an_anatomy_is_looked_up_by_the_name_of_a_site():
    anatomy = shared_model("vit").anatomy
    assert anatomy["blocks.2.heads"].block == 2
    with pytest.raises(KeyError):
        anatomy["blocks.3.heads"]


# variants of timm's VisionTransformer


def kinds(anatomy: Anatomy) -> set[str]:
    return {site.kind for site in anatomy}


def dissected(module: nn.Module) -> Anatomy:
    return dissect(module, family_of(module))


def test_a_norm_over_all_heads_leaves_the_heads_out():
    assert kinds(dissected(new_timm_vit(scale_attn_norm=True))) == {"neurons"}


def test_a_norm_over_all_neurons_leaves_the_neurons_out():
    assert kinds(dissected(new_timm_vit(scale_mlp_norm=True))) == {"heads"}


def test_a_gate_over_the_heads_leaves_the_heads_out():
    from functools import partial

    from timm.layers import Attention

    module = new_timm_vit()
    gated = partial(Attention, 48, num_heads=HEADS, qkv_bias=True, gated=True)
    for block in module.blocks:
        block.attn = gated()
    assert kinds(dissected(module)) == {"neurons"}


def test_nothing_prunable_is_an_error_that_says_why():
    with pytest.raises(InputError, match=r"nothing is prunable.*timm-vit") as caught:
        dissected(new_timm_vit(scale_attn_norm=True, scale_mlp_norm=True))
    assert "must_be_identity" in str(caught.value)


def test_differential_attention_is_refused():
    """Its heads come in pairs that share a norm; the sizes alone would fit the table."""
    with pytest.raises(InputError, match=r"blocks\.0\.attn\.attn_dim"):
        dissected(new_timm_vit(attn_layer="diff"))


def test_a_packed_gate_belongs_to_its_neuron():
    from timm.layers import GluMlp

    anatomy = dissected(new_timm_vit(mlp_layer=GluMlp))
    assert [(s.units, s.producers[0].parts) for s in anatomy if s.kind == "neurons"] == [(48, 2)] * BLOCKS


def test_a_response_norm_over_all_neurons_leaves_the_neurons_out():
    from timm.layers import GlobalResponseNormMlp

    module = new_timm_vit()
    for block in module.blocks:
        block.mlp = GlobalResponseNormMlp(48, 96)
    assert kinds(dissected(module)) == {"heads"}


def test_parallel_blocks_are_refused_naming_the_missing_path():
    from timm.models.vision_transformer import ParallelThingsBlock

    with pytest.raises(InputError, match=r"blocks\.0\.attn\b") as caught:
        dissected(new_timm_vit(block_fn=ParallelThingsBlock))
    assert DOCS in str(caught.value)


def test_a_block_with_one_input_projection_is_refused_naming_the_missing_path():
    from timm.models.vision_transformer import ParallelScalingBlock

    with pytest.raises(InputError, match=r"blocks\.0\.attn\b"):
        dissected(new_timm_vit(block_fn=ParallelScalingBlock))


def test_heads_that_share_keys_are_refused_naming_the_projection():
    shared = {"attn_type": "rope", "qkv_fused": False, "num_kv_heads": 2}
    with pytest.raises(InputError, match=r"blocks\.0\.attn\.k_proj gives 24 features"):
        dissected(new_timm("eva02_tiny_patch14_224", **shared))


def test_an_eva_with_nothing_to_remove_says_why():
    """Its attention has a fixed width, and a norm runs over all neurons."""
    with pytest.raises(InputError, match=r"nothing is prunable in Eva") as caught:
        dissected(new_timm("eva02_base_patch14_224"))
    assert "requires" in str(caught.value)


def test_the_examples_of_a_sites_docstring_are_what_dissect_finds():
    import timm
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        bert, resnet = BertModel(BertConfig()), timm.create_model("resnet18")
    found = {"bert": dissected(bert), "resnet": dissected(resnet)}
    example = doctest.DocTestFinder(recurse=False).find(Site, "Site", globs=found)[0]
    assert len(example.examples) == 8
    assert doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example).failed == 0
