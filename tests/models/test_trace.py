"""Proposed tables: the hand-written ones again, models that nobody listed, and reasons for what is left out."""

from __future__ import annotations

import copy
import random
from dataclasses import astuple

import pytest
import torch
import yaml
from helpers.families import ALL, BLOCKS, HEADS, INNER, MORE_FAMILIES, WIDTH
from helpers.models import new_timm, new_timm_vit, randomise, saved_model, shared_model
from helpers.traced import UNLISTED, UNLISTED_TIMM, library_of, new_unlisted, trace_module, traced
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from optin_cli.errors import InputError, UnknownArchitecture, UsageError
from optin_cli.models.anatomy import Producer, Site
from optin_cli.models.dissect import dissect, family_of
from optin_cli.models.families import family_from_dict, family_to_yaml, find_family
from optin_cli.models.hidden import as_rows, hidden_of
from optin_cli.models.masking import masked, masks_from_keep
from optin_cli.models.slicing import slice_model
from optin_cli.models.trace.propose import propose, trace
from optin_cli.models.trace.run import BATCH, forward, synthetic_inputs, tensors_of

# what a tracer without any table must find: kind -> (units, width) of the sites of one block
FOUND = {
    "ernie": {"heads": (HEADS, 8), "neurons": (INNER, 1)},
    "nomic": {"heads": (HEADS, 8), "neurons": (INNER, 1)},
    "granite": {"heads": (HEADS // 2, 16), "neurons": (INNER, 1)},
    "persimmon": {"heads": (HEADS, 8), "neurons": (INNER, 1)},
    "imagegpt": {"heads": (HEADS, 8), "neurons": (INNER, 1)},
    "mobilebert": {"heads": (HEADS, 4), "neurons1": (INNER, 1), "neurons2": (INNER, 1)},
    "nystromformer": {"heads": (HEADS, 8), "neurons": (INNER, 1)},
    "vit_mae": {"heads": (HEADS, 8), "neurons": (INNER, 1)},
    "mixer": {"neurons1": (WIDTH // 2, 1), "neurons2": (4 * WIDTH, 1)},
}
RELATIVE = "its heads attend to relative positions as well, whose MACs only a table tells"
STREAMS = "it has several streams of blocks, of which a trace finds one"
PARTLY = {  # listed families -> why a trace finds less than their tables hold
    "deberta": RELATIVE,
    "deberta-v2": RELATIVE,
    "deberta-v3": RELATIVE,
    "segformer": "between stages tokens become a map: a trace finds the chain of stages, not of the blocks in them",
    "mask2former-swin": STREAMS,
    "mask2former-resnet": STREAMS,
    "maskformer-swin": STREAMS,
    "maskformer-resnet": STREAMS,
}
REFUSED = {  # listed families -> why a trace finds nothing
    "t5": "You must specify",  # a decoder wants inputs of its own
    "t5-gated": "You must specify",
    "albert": "runs 3 times",  # blocks share a module
    "albert-groups": "runs 2 times",
    "timm-vgg-bn": "no blocks are found",  # layers without residuals: units run from one block to the next
    "timm-vgg": "no blocks are found",
    "torchvision-vgg": "no blocks are found",
}
CONVOLUTIONAL = ["mobilenet_v2", "poolformer", "byobnet", "coatnet"]
every_model = pytest.mark.parametrize("name", [*FOUND, *CONVOLUTIONAL])


def inputs_of(module: nn.Module, name: str) -> dict[str, Tensor]:
    """Other inputs than those of the trial, of other lengths and with more padding."""
    modality = traced(name).family.modality
    inputs = synthetic_inputs(module, library_of(name), modality)
    generator = torch.Generator().manual_seed(7)
    if modality == "image":
        return {key: torch.randn(value.shape, generator=generator) for key, value in inputs.items()}
    if name == "nystromformer":  # as long as its landmarks
        return {key: value.flip(0) for key, value in inputs.items()}
    ids = torch.randint(5, module.config.vocab_size, (4, 13), generator=generator)
    mask = (torch.arange(13) < torch.tensor([[13], [9], [5], [2]])).long()
    return {"input_ids": ids, "attention_mask": mask}


def key(site: Site) -> tuple:
    """What a site is, whatever the order in which a table names its parts."""
    producers = sorted(map(astuple, site.producers))
    parts = (sorted(site.carried), site.readers, site.masked_at, site.norm, sorted(site.tensors))
    costs = (site.macs_per_token, site.macs_per_pair, site.params_per_unit)
    return site.kind, site.block, site.units, site.width, site.group, producers, site.consumer, parts, costs


# ---- the hand-written tables, found again without them ----


@pytest.mark.parametrize("name", [n for n in (*ALL, *MORE_FAMILIES) if n not in {**PARTLY, **REFUSED}])
def test_every_listed_family_is_found_again(name):
    """Same blocks, same sites, same costs as the table that was written and checked by hand."""
    proposal = propose(str(saved_model(name)))
    expected = shared_model(name).anatomy
    assert proposal.listed == shared_model(name).family.name
    assert proposal.anatomy.blocks == expected.blocks
    assert sorted(map(key, proposal.anatomy)) == sorted(map(key, expected))
    assert proposal.family.chained == shared_model(name).family.chained
    assert proposal.family.arguments == shared_model(name).family.arguments
    if proposal.family.arguments:  # its cache goes on counting tokens
        bypasses = [{s.consumer: s.bypass for s in anatomy} for anatomy in (proposal.anatomy, expected)]
        assert bypasses[0] == bypasses[1]


@pytest.mark.parametrize("name", PARTLY)
def test_what_is_found_of_a_family_that_no_trace_tells_whole_is_right(name):
    proposal = propose(str(saved_model(name)))
    expected = {s.consumer: s for s in shared_model(name).anatomy}
    assert len(proposal.anatomy.sites) > 0
    for site in proposal.anatomy:
        other = expected[site.consumer]
        assert (site.kind, site.units, site.width) == (other.kind, other.units, other.width)
        assert {p.path for p in site.producers} == {p.path for p in other.producers}
        assert site.macs_per_token <= other.macs_per_token and site.macs_per_pair <= other.macs_per_pair
    assert proposal.family.chained == shared_model(name).family.chained


@pytest.mark.parametrize(("name", "said"), REFUSED.items())
def test_a_family_that_no_trace_tells_at_all_is_refused(name, said):
    with pytest.raises(InputError, match=said):
        propose(str(saved_model(name)))


def test_the_table_of_the_docs_is_found_again():
    proposed = {site.consumer: key(site) for site in traced("ernie").anatomy}
    written = dissect(new_unlisted("ernie"), find_family(["bert"]))  # ERNIE is built like BERT
    assert proposed == {site.consumer: key(site) for site in written}
    assert traced("ernie").listed == ""


# ---- models that are in no table ----


@pytest.mark.parametrize("name", FOUND)
def test_the_sites_of_a_transformer_are_found_in_every_block(name):
    anatomy = traced(name).anatomy
    blocks = 2 if name == "mixer" else BLOCKS
    assert [(site.block, site.label, site.units, site.width) for site in anatomy] == [
        (block, label, *sizes) for block in range(blocks) for label, sizes in FOUND[name].items()
    ]


@every_model
def test_a_table_survives_its_file_and_slices_another_model_of_the_kind(name):
    """Fresh weights and other inputs than the trial's: the oracle is the masked model."""
    text = family_to_yaml(traced(name).family, ["a comment"])
    family = family_from_dict(yaml.safe_load(text))
    assert family == traced(name).family
    module = new_unlisted(name, seed=5)
    anatomy = dissect(module, family)
    inputs = inputs_of(module, name)
    draw = random.Random(1)
    keep = {s.name: sorted(draw.sample(range(s.units), draw.randint(1, s.units))) for s in anatomy}
    smaller = copy.deepcopy(module)
    slice_model(smaller, anatomy, keep)
    with torch.no_grad():
        dense = tensors_of(forward(module, inputs))[0]
        found = tensors_of(forward(smaller, inputs))[0]
        with masked(module, anatomy, masks_from_keep(anatomy, keep)):
            expected = tensors_of(forward(module, inputs))[0]
    size = float(expected.abs().max())
    torch.testing.assert_close(found / size, expected / size, rtol=0, atol=1e-5)
    assert not torch.allclose(dense / size, expected / size, rtol=0, atol=1e-3)
    assert {s.name: s.units for s in dissect(smaller, family)} == {n: len(units) for n, units in keep.items()}


@every_model
def test_costs_are_never_more_than_torch_counts(name):
    """A budget must hold: what a site is said to save, the model saves."""
    module = new_unlisted(name).requires_grad_(False)
    anatomy = dissect(module, traced(name).family)
    inputs = synthetic_inputs(module, library_of(name), traced(name).family.modality)
    keep = {site.name: list(range(site.units // 2)) for site in anatomy}
    smaller = copy.deepcopy(module)
    slice_model(smaller, anatomy, keep)
    counted = []
    for model in (module, smaller):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            forward(model, inputs)
        counted.append(counter.get_total_flops() / 2 / BATCH)
    positions = first_positions(module, anatomy.blocks[0], inputs, traced(name).family.layout)
    kept = {site: len(units) for site, units in keep.items()}
    saved = anatomy.macs(positions) - anatomy.macs(positions, kept)
    assert 0.5 * (counted[0] - counted[1]) < saved <= 1.01 * (counted[0] - counted[1])


def first_positions(module: nn.Module, block: str, inputs: dict[str, Tensor], layout: str) -> int:
    seen = []
    hook = module.get_submodule(block).register_forward_hook(
        lambda _, __, output: seen.append(as_rows(hidden_of(output), layout).shape[1])
    )
    with torch.no_grad():
        forward(module, inputs)
    hook.remove()
    return seen[0]


def test_what_a_convolution_over_heads_needs_is_found_by_trying():
    table = traced("nystromformer").family.sites[0]
    assert table.tensors == {"attention.self.conv.weight": 0}
    assert table.counts["attention.self.conv.groups"] == "units"


def test_squeeze_and_excites_and_norms_come_along():
    squeezed = next(s for s in traced("byobnet").family.sites if s.masked_at)
    assert squeezed.masked_at == "attn" and squeezed.readers == ("attn.fc1",)
    assert [p.path for p in squeezed.producers][1:] == ["attn.fc2"]
    inverted = traced("mobilenet_v2").family.sites[0]
    assert inverted.carried == (
        "expand_1x1.normalization",
        "conv_3x3.convolution",
        "conv_3x3.normalization",
    )


def test_blocks_that_are_registered_in_another_order_are_listed_in_the_one_they_run_in():
    blocks = traced("poolformer").anatomy.blocks
    assert blocks[2] == "encoder.patch_embeddings.1"
    assert [block.rpartition(".")[0] for block in blocks[:2] + blocks[3:]] == [
        *["encoder.block.0"] * 2,
        *["encoder.block.1"] * 2,
    ]


def test_other_outputs_than_hidden_states_do_not_matter():
    """Each block of a model that gives attention weights too has as many of them as heads."""
    model = new_unlisted("ernie")
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    assert [row.table.label for row in trace_module(model).rows] == ["heads", "neurons"]


# ---- what is left out, and why ----


def reasons(proposal) -> str:
    return "\n".join(f"{gone.where}: {gone.why}" for gone in proposal.left)


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


def test_heads_whose_sharing_no_attribute_tells_are_left_out():
    from optin_cli.models.tables import SiteTable
    from optin_cli.models.trace.describe import name_group
    from optin_cli.models.trace.run import Call
    from optin_cli.models.trace.verify import Failed, Trial

    trial = Trial(Block(nn.Identity()), Call((), {}, None, (), ()), "")
    with pytest.raises(Failed, match="2 heads share what k gives, and no attribute holds that number"):
        name_group(trial, SiteTable("heads", (Producer("q"), Producer("k", shared=True)), "o"), 2)


def test_heads_with_an_argument_for_all_examples_at_once_are_left_out():
    """Bloom's biases of positions are (examples * heads, 1, tokens)."""
    assert [row.table.label for row in traced("bloom").rows] == ["neurons"]
    assert "self_attention.dense (all blocks): it does not run without" in reasons(traced("bloom"))


def test_heads_whose_cost_no_table_tells_are_left_out():
    """Hiera attends within windows in one stage and pools the queries of another."""
    proposal = traced("hiera")
    assert [row.table.label for row in proposal.rows] == ["neurons"]
    assert "attn.proj: its MACs can't be told from a table" in reasons(proposal)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("convnextv2", r"nothing prunable.*pwconv\*: its inputs are mixtures"),
        ("albert", "no blocks.*albert_layers.0.* runs 3 times: blocks that share a module are not traced"),
        ("xlnet", "no blocks are found in XLNetModel: looked for two or more modules"),
        ("speech", "a ASTModel reads input_values; optin prunes models of text and of images"),
    ],
)
def test_a_model_without_sites_or_blocks_is_refused_saying_what_was_looked_for(name, said):
    with pytest.raises(InputError, match=said):
        trace_module(new_unlisted(name))


def test_a_projection_for_attention_and_mlp_at_once_is_refused():
    from timm.models.vision_transformer import ParallelScalingBlock

    with pytest.raises(InputError, match=r"blocks\.\*\.attn_out_proj: what it reads, mlp_out_proj reads too"):
        trace_module(new_timm_vit(block_fn=ParallelScalingBlock), "timm")


def test_an_unknown_modality_is_a_usage_error():
    with pytest.raises(UsageError, match="unknown --modality 'smell'"):
        propose(str(saved_model("bert")), modality="smell")


# ---- blocks made for one reason each ----


class Block(nn.Module):
    """x + down(between(act(up(x))))"""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.between = between
        self.down = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.between(torch.relu(self.up(x))))


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Roll(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.roll(1, -1)


class PerUnit(nn.Module):
    """What it gives depends on how many units there are."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.shape[-1]


def trace_stack(*blocks: nn.Module):
    torch.manual_seed(0)
    return trace(Stack(*blocks).eval(), {"x": torch.randn(BATCH, 5, 4)}, library="timm", modality="image")


def test_plain_blocks_of_no_library_are_traced():
    proposal = trace_stack(Block(nn.Identity()), Block(nn.Identity()))
    assert proposal.family.matches == ("Stack",) and proposal.family.blocks == "layers"
    assert [site.units for site in proposal.anatomy] == [6, 6]


@pytest.mark.parametrize(
    ("between", "said"),
    [(lambda: nn.LayerNorm(6), "its inputs are mixtures"), (Roll, "at other places")],
)
def test_units_that_mix_or_move_are_left_out(between, said):
    with pytest.raises(InputError, match=rf"no blocks are found in Stack.*layers\.\*\.down: .*{said}"):
        trace_stack(Block(between()), Block(between()))


def test_a_block_that_runs_without_units_but_computes_something_else_is_left_out():
    with pytest.raises(
        InputError, match=r"down \(all blocks\): the sliced block does not compute what the masked"
    ):
        trace_stack(Block(PerUnit()), Block(PerUnit()))


def test_blocks_between_which_hidden_states_change_in_place_are_no_chain():
    class Shifted(Stack):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
                x += 1
            return x

    model = Shifted(Block(nn.Identity()), Block(nn.Identity())).eval()
    with pytest.raises(InputError, match=r"layers\.1 is not given what layers\.0 gives"):
        trace(model, {"x": torch.randn(BATCH, 5, 4)}, library="timm", modality="image")


def test_a_block_that_differs_is_told_from_the_others():
    """One block has a norm over its neurons: the table must leave it out, and only it."""
    proposal = trace_stack(Block(nn.Identity()), Block(nn.LayerNorm(6)), Block(nn.Identity()))
    assert [site.block for site in proposal.anatomy] == [0, 2]
    assert proposal.family.sites[0].must_be_identity == ("between",)
    assert "down (blocks 1): its inputs are mixtures" in reasons(proposal)


def test_blocks_that_share_a_weight_are_left_out_by_name():
    first, second = Block(nn.Identity()), Block(nn.Identity())
    second.up.weight = first.up.weight
    with pytest.raises(InputError, match=r"layers\.0\.up\.weight and layers\.1\.up\.weight are one weight"):
        trace_stack(first, second)


def test_a_dead_gain_hides_nothing():
    """A layer scale of 0, as freshly made models have: the site is there all the same."""
    blocks = [Block(nn.Identity()) for _ in range(2)]
    for block in blocks:
        nn.init.zeros_(block.down.weight)
    assert len(trace_stack(*blocks).anatomy.sites) == 2


def test_heads_of_queries_that_share_keys_are_one_unit():
    table = traced("granite").family.sites[0]
    assert table.group == "self_attn.num_key_value_groups" and table.unit_width == "self_attn.head_dim"
    assert [p.shared for p in table.producers] == [False, True, True]


@pytest.mark.parametrize("name", ["granite", "persimmon"])
def test_a_traced_decoder_generates_with_its_cache_when_a_block_has_no_heads(name):
    import transformers

    class_name, settings = UNLISTED[name]
    cls = getattr(transformers, class_name.replace("Model", "ForCausalLM"))
    model = randomise(cls(cls.config_class(**settings))).eval()
    family = traced(name).family
    assert family.arguments == {"use_cache": False}
    slice_model(model, dissect(model, family), {"blocks.0.heads": [], "blocks.2.heads": [1]})
    prompt = torch.tensor([[5, 9, 17, 4]])
    made = [model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=cache)
            for cache in (True, False)]  # fmt: skip
    assert torch.equal(*made)


def test_a_head_that_reads_several_blocks_makes_them_no_chain():
    class Skip(Stack):
        def forward(self, x: Tensor) -> Tensor:
            first = self.layers[0](x)
            return self.layers[1](first) + first.clone()

    torch.manual_seed(0)
    model = Skip(Block(nn.Identity()), Block(nn.Identity())).eval()
    proposal = trace(model, {"x": torch.randn(BATCH, 5, 4)}, library="timm", modality="image")
    assert not proposal.family.chained
    assert trace_stack(Block(nn.Identity()), Block(nn.Identity())).family.chained


@pytest.mark.parametrize("name", [n for n in (*UNLISTED, *UNLISTED_TIMM, "mixer") if n not in REFUSED])
def test_all_unlisted_models_are_unlisted(name):
    with pytest.raises(UnknownArchitecture):
        family_of(new_unlisted(name))
