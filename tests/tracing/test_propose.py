"""The tracer: tables of listed families found again, and those of models that are in none."""

from __future__ import annotations

import copy
import random
from dataclasses import astuple

import pytest
import torch
import yaml
from helpers.families import ALL, BLOCKS, ENCODER_DECODERS, HEADS, INNER, MORE_FAMILIES, WIDTH
from helpers.flops import flop_counter
from helpers.models import saved_model, shared_model
from helpers.traced import UNLISTED, UNLISTED_TIMM, library_of, new_unlisted, trace_module, traced
from torch import Tensor, nn

from optin_cli.architectures.families import family_from_dict, family_to_yaml, find_family
from optin_cli.architectures.resolve import dissect, family_of
from optin_cli.errors import InputError, UnknownArchitecture
from optin_cli.structure.anatomy import Site
from optin_cli.structure.hidden_states import as_rows, hidden_of
from optin_cli.tracing import propose as tracing
from optin_cli.tracing.propose import Proposal, propose, trace
from optin_cli.tracing.record import BATCH, forward, synthetic_inputs, tensors_of
from optin_cli.transforms.masking import masked, masks_from_keep
from optin_cli.transforms.slicing import slice_model

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
    **dict.fromkeys(ENCODER_DECODERS, "an encoder and a decoder"),
    "albert": "runs 3 times",  # blocks share a module
    "albert-groups": "runs 2 times",
    "timm-vgg-bn": "no blocks are found",  # layers without residuals: units run from one block to the next
    "timm-vgg": "no blocks are found",
    "torchvision-vgg": "no blocks are found",
    **dict.fromkeys(
        ["whisper", "whisper-classifier", "whisper-all-blocks"], "only models of texts and images"
    ),
}

CONVOLUTIONAL = ["mobilenet_v2", "poolformer", "byobnet", "coatnet"]

ALIKE = {
    "nomic",
    "persimmon",
    "imagegpt",
    "mobilebert",
    "nystromformer",
    "vit_mae",
    "mobilenet_v2",
    "coatnet",
}
"""Others stand for them, but where the slow tests run."""


def each(names):
    marked = [pytest.param(n, marks=[pytest.mark.slow] * (n in ALIKE)) for n in names]
    return pytest.mark.parametrize("name", marked)


every_model = each([*FOUND, *CONVOLUTIONAL])


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
    parts = (sorted(site.carried), site.readers, site.masked_at, site.norm, sorted(site.tensors.items()))
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


@each(FOUND)
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
        with torch.no_grad(), flop_counter() as counter:
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


@pytest.mark.parametrize("name", [n for n in (*UNLISTED, *UNLISTED_TIMM, "mixer") if n not in REFUSED])
def test_all_unlisted_models_are_unlisted(name):
    with pytest.raises(UnknownArchitecture):
        family_of(new_unlisted(name))


def test_positions_that_can_be_interpolated_are_tried_on_small_images(monkeypatch):
    """The same is found, and few of the passes are over a whole image."""
    import transformers

    config = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=128
    )

    def found() -> tuple[Proposal, list[int]]:
        torch.manual_seed(0)
        module = transformers.SiglipVisionModel(config).eval()
        sides: list[int] = []
        module.register_forward_pre_hook(
            lambda _, __, given: sides.append(given["pixel_values"].shape[-1]), with_kwargs=True
        )
        inputs = synthetic_inputs(module, "transformers", "image")
        return trace(module, inputs, library="transformers", modality="image"), sides

    quick, sides = found()
    monkeypatch.setattr(tracing, "smaller_images", lambda _, inputs: inputs)
    slow, whole = found()
    assert (quick.family, quick.rows, quick.positions) == (slow.family, slow.rows, slow.positions)
    assert quick.positions == 64 and {site.label for site in quick.anatomy} == {"heads", "neurons"}
    assert sides.count(128) <= 5 < whole.count(128) and set(sides) == {64, 128}


def test_the_heads_of_a_model_of_three_tokens_are_found():
    import transformers

    config = transformers.BertConfig(
        vocab_size=3, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64
    )
    module = transformers.BertModel(config).eval()
    found = trace(
        module, synthetic_inputs(module, "transformers", "text"), library="transformers", modality="text"
    )
    assert {site.label for site in found.anatomy} == {"heads", "neurons"} and not found.left
