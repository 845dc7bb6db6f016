"""Tables that don't describe a model, and weights that several modules share: refused by name."""

from __future__ import annotations

import dataclasses

import pytest
from helpers.families import BLOCKS
from helpers.models import new_model
from torch import nn

from optin_cli.architectures.families import Family, SiteTable, find_family
from optin_cli.architectures.resolve import dissect
from optin_cli.errors import InputError
from optin_cli.structure.anatomy import Bypass, Producer, UnitInput

# several tables of one kind


class Variants(nn.Module):
    """Three blocks: one with a gate, one whose gate is None, one without."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.ModuleDict({"up": nn.Linear(4, 6), "down": nn.Linear(6, 4)}) for _ in range(BLOCKS)]
        layers[0]["gate"] = nn.Linear(4, 6)
        layers[1].register_module("gate", None)
        self.layers = nn.ModuleList(layers)


GATED = SiteTable("neurons", (Producer("gate"), Producer("up")), "down", requires=("gate",))
PLAIN = SiteTable("neurons", (Producer("up"),), "down")


def test_a_block_takes_the_first_table_whose_requirements_it_meets():
    anatomy = dissect(Variants(), Family("variants", ("Variants",), "layers", (GATED, PLAIN)))
    assert [len(site.producers) for site in anatomy] == [2, 1, 1]
    swapped = dissect(Variants(), Family("variants", ("Variants",), "layers", (PLAIN, GATED)))
    assert [len(site.producers) for site in swapped] == [1, 1, 1]


def test_a_kind_without_a_fitting_table_is_left_out():
    anatomy = dissect(Variants(), Family("variants", ("Variants",), "layers", (GATED,)))
    assert [site.name for site in anatomy] == ["blocks.0.neurons"]


# tables that don't describe the model


def changed(**changes) -> Family:
    """The table of BERT with another site of heads."""
    bert = find_family(["bert"])
    return dataclasses.replace(bert, sites=(dataclasses.replace(bert.sites[0], **changes), bert.sites[1]))


@pytest.mark.parametrize(
    ("family", "missing", "holder"),
    [
        (
            dataclasses.replace(find_family(["bert"]), blocks="encoder.layers"),
            "encoder.layers",
            "BertEncoder",
        ),
        (changed(consumer="attention.out"), "encoder.layer.0.attention.out", "BertAttention"),
        (changed(producers=(Producer("attn.q"),)), "encoder.layer.0.attn.q", "BertLayer"),
        (changed(unit_width="attention.self.width"), "encoder.layer.0.attention.self.width", "BertModel"),
        (changed(counts={"attention.self.n": "units"}), "encoder.layer.0.attention.self.n", "BertModel"),
        (changed(must_be_identity=("attn.norm",)), "encoder.layer.0.attn", "BertLayer"),
        (changed(unit_inputs=(UnitInput("attn", "x", 1),)), "encoder.layer.0.attn", "BertLayer"),
        (changed(unit_inputs=(UnitInput("attention", "bias", 1),)), "bias", "BertAttention"),
    ],
    ids=["blocks", "consumer", "producer", "width", "counts", "identity", "unit_input", "argument"],
)
def test_a_wrong_path_is_named_with_the_module_that_lacks_it(family, missing, holder):
    with pytest.raises(InputError) as caught:
        dissect(new_model("bert", "encoder"), family)
    assert missing in str(caught.value)
    assert holder in str(caught.value)
    assert "'bert'" in str(caught.value)


def test_a_table_whose_producer_does_not_feed_its_consumer_is_refused_naming_both():
    family = changed(producers=(Producer("intermediate.dense"),))
    with pytest.raises(InputError) as caught:
        dissect(new_model("bert", "encoder"), family)
    assert "encoder.layer.0.intermediate.dense gives 64" in str(caught.value)
    assert "encoder.layer.0.attention.output.dense" in str(caught.value)


def test_a_unit_width_that_does_not_divide_the_features_is_refused():
    with pytest.raises(InputError, match=r"blocks\.0\.heads.*32.*multiple.*5") as caught:
        dissect(new_model("bert", "encoder"), changed(unit_width=5))
    assert "attention.output.dense" in caught.value.what
    assert "unit_width" in caught.value.hint


def test_a_site_of_other_layers_than_linear_is_refused_naming_the_layer():
    family = changed(consumer="attention.output.LayerNorm")
    with pytest.raises(InputError, match=r"encoder\.layer\.0\.attention\.output\.LayerNorm is a LayerNorm"):
        dissect(new_model("bert", "encoder"), family)


def test_a_model_without_blocks_is_refused():
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList()

    family = Family("empty", ("Empty",), "layers", (SiteTable("neurons", (Producer("up"),), "down"),))
    with pytest.raises(
        InputError, match=r"no blocks at layers\.\* \(layers is a ModuleList and holds nothing\)"
    ):
        dissect(Empty(), family)


def test_a_tensor_without_a_slice_for_each_unit_is_refused_with_its_shape():
    family = changed(tensors={"intermediate.dense.weight": 0})
    with pytest.raises(InputError, match=r"blocks\.0\.heads.*dense\.weight.*\(64, 32\).*axis 0.*4 units"):
        dissect(new_model("bert", "encoder"), family)


def test_a_number_of_units_gives_their_width():
    family = changed(unit_width=1, unit_count="attention.self.num_attention_heads")
    assert dissect(new_model("bert", "encoder"), family).sites[0].width == 8
    with pytest.raises(InputError, match=r"blocks\.0\.heads.*32 features, no multiple of its 3 units"):
        model = new_model("bert", "encoder")
        model.encoder.layer[0].attention.self.num_attention_heads = 3
        dissect(model, family)


def test_a_bypass_around_another_module_is_refused():
    with pytest.raises(
        InputError, match=r"0\.attention\.self can't give the bias of .*\.attention\.output\.dense"
    ):
        dissect(new_model("bert", "encoder"), changed(bypass=Bypass("attention.self")))


# weights that several modules share


class Tied(nn.Module):
    """Two blocks of `up` and `down`, and an embedding in front."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        layers = [nn.ModuleDict({"up": nn.Linear(4, 6), "down": nn.Linear(6, 4)}) for _ in range(2)]
        self.layers = nn.ModuleList(layers)


TIED = Family("tied", ("Tied",), "layers", (PLAIN,))


def test_a_weight_that_two_sites_would_slice_is_refused_naming_both():
    model = Tied()
    model.layers[1]["down"].weight = model.layers[0]["down"].weight
    with pytest.raises(InputError, match=r"layers\.0\.down\.weight and layers\.1\.down\.weight") as caught:
        dissect(model, TIED)
    assert "blocks.0.neurons along axis 1" in str(caught.value)
    assert "blocks.1.neurons along axis 1" in str(caught.value)


def test_a_weight_that_something_else_needs_whole_is_refused():
    model = Tied()
    model.layers[0]["up"].weight = model.embedding.weight
    with pytest.raises(
        InputError, match=r"layers\.0\.up\.weight and embedding\.weight .* no site the second"
    ):
        dissect(model, TIED)


def test_a_layer_that_two_sites_claim_is_refused_naming_both():
    twice = dataclasses.replace(TIED, sites=(PLAIN, dataclasses.replace(PLAIN, name="again")))
    with pytest.raises(
        InputError, match=r"blocks\.0\.neurons and blocks\.0\.again both slice layers\.0\.up\.weight"
    ):
        dissect(Tied(), twice)


def test_a_layer_under_two_names_is_refused():
    model = Tied()
    model.layers[1]["up"] = model.layers[0]["up"]
    with pytest.raises(InputError, match=r"layers\.0\.up\.weight and layers\.1\.up\.weight are one weight"):
        dissect(model, TIED)


def test_a_weight_that_one_site_slices_alike_under_two_names_may_be_shared():
    model = Tied()
    for layer in model.layers:
        layer["gate"] = nn.Linear(4, 6)
        layer["gate"].weight = layer["up"].weight
    assert len(dissect(model, dataclasses.replace(TIED, sites=(GATED,))).sites) == 2


def test_weights_that_no_site_slices_may_be_shared():
    model = Tied()
    model.head = nn.Linear(4, 6, bias=False)
    model.head.weight = model.embedding.weight
    assert len(dissect(model, TIED).sites) == 2
    model.layers[1]["down"].bias = model.layers[0]["down"].bias  # a consumer keeps its bias
    assert len(dissect(model, TIED).sites) == 2


def test_plain_paths_of_blocks_keep_their_order():
    family = dataclasses.replace(TIED, blocks=("layers.1", "layers.0"))
    assert dissect(Tied(), family).blocks == ("layers.1", "layers.0")
