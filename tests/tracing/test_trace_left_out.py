"""The tracer: what it leaves out and refuses, and why."""

from __future__ import annotations

import pytest
from helpers.models import new_timm, new_timm_vit, saved_model
from helpers.traced import new_unlisted, reasons, trace_module, traced

from optin_cli.errors import InputError, UsageError
from optin_cli.tracing.propose import propose
from optin_cli.tracing.record import modality_of


def test_heads_of_a_fixed_width_are_left_out():
    """timm's EvaAttention reshapes its context to the width of its input."""
    proposal = trace_module(new_timm("eva02_tiny_patch14_224", qkv_fused=False), "timm")
    assert [row.table.label for row in proposal.rows] == ["neurons"]
    assert "attn.proj (all blocks): it does not run without 1 of its 4 units: shape" in reasons(proposal)


def test_a_layer_whose_weight_is_used_without_it_is_named():
    """Fused, EvaAttention multiplies by the weight of `qkv` itself."""
    proposal = trace_module(new_timm("eva02_tiny_patch14_224"), "timm")
    assert [row.table.label for row in proposal.rows] == ["neurons"]
    assert "attn.qkv (all blocks): it is never called" in reasons(proposal)


def test_heads_that_share_keys_of_one_projection_with_their_queries_are_left_out():
    """Of its outputs half are queries, a quarter keys, a quarter values."""
    assert [row.table.label for row in traced("phi3").rows] == ["neurons"]
    assert "self_attn.o_proj (all blocks): its inputs are mixtures" in reasons(traced("phi3"))


def test_heads_with_an_argument_for_all_examples_at_once_are_left_out():
    """Bloom's biases of positions are (examples * heads, 1, tokens)."""
    assert [row.table.label for row in traced("bloom").rows] == ["neurons"]
    assert "self_attention.dense (all blocks): it does not run without" in reasons(traced("bloom"))


def test_heads_whose_cost_no_table_tells_are_left_out():
    """Hiera attends within windows in one stage and pools the queries of another."""
    proposal = traced("hiera")
    assert [row.table.label for row in proposal.rows] == ["neurons"]
    assert "attn.proj: its MACs don't follow from a table" in reasons(proposal)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("convnextv2", r"nothing prunable.*pwconv\*: its inputs are mixtures"),
        ("albert", "no blocks.*albert_layers.0.* runs 3 times: blocks that share a module are not traced"),
        ("xlnet", "no blocks are found in XLNetModel: looked for two or more modules"),
        ("speech", "a ASTModel reads input_values; only models of texts and images are traced"),
    ],
)
def test_a_model_without_sites_or_blocks_is_refused_saying_what_was_looked_for(name, said):
    with pytest.raises(InputError, match=said):
        trace_module(new_unlisted(name))


@pytest.mark.parametrize("modality", [None, "text", "image"])
def test_a_model_of_two_towers_is_refused_with_the_way_to_trace_one(modality):
    from transformers import SiglipConfig, SiglipModel

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    towers = SiglipConfig(text_config=small, vision_config={**small, "image_size": 32, "patch_size": 8})
    with pytest.raises(InputError, match="SiglipModel reads texts and images together") as refused:
        modality_of(SiglipModel(towers), "transformers", modality)
    assert "vision model alone" in str(refused.value.hint)


def test_a_projection_for_attention_and_mlp_at_once_is_refused():
    from timm.models.vision_transformer import ParallelScalingBlock

    with pytest.raises(InputError, match=r"blocks\.\*\.attn_out_proj: what it reads, mlp_out_proj reads too"):
        trace_module(new_timm_vit(block_fn=ParallelScalingBlock), "timm")


def test_an_unknown_modality_is_a_usage_error():
    with pytest.raises(UsageError, match="unknown modality 'smell'"):
        propose(str(saved_model("bert")), modality="smell")
