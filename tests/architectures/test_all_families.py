"""What the further families promise of their sites: sliced equals masked, counted MACs, empty layers work."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.artefacts import keep_sets
from helpers.families import (
    BLOCKS,
    CNNS,
    ENCODER_DECODERS,
    HEADS,
    INNER,
    MORE_FAMILIES,
    MORE_TIMM,
    SEGMENTERS,
    WIDTH,
)
from helpers.models import saved_model, shared_model
from helpers.promises import SHARED, SWINS, counted_macs, every_family, is_shared, masked_outputs, sliced
from helpers.runs import examples, outputs, random_inputs
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from optin_cli.architectures.resolve import dissect
from optin_cli.loading.checkpoint import open_model
from optin_cli.transforms.slicing import slice_model

NEURONS_ALONE = {"timm-eva02", "timm-dinov3", "timm-beit", "timm-swinv2"}
POSITION_BIAS = ("continuous_position_bias_mlp", "cpb_mlp")  # made once a batch: not counted as a unit's
TIMM_WIDTH = 48
# a SwiGLU keeps two thirds of mlp_ratio * width, or splits it into gates and values
NEURON_COUNTS = {**dict.fromkeys(MORE_TIMM, 2 * TIMM_WIDTH), "timm-swiglu": TIMM_WIDTH}

every_transformer = pytest.mark.parametrize(
    "name", [name for name in MORE_FAMILIES if name not in (*CNNS, *SEGMENTERS)]
)


@every_transformer
def test_the_sites_are_the_heads_and_neurons_of_every_block(name):
    model = shared_model(name)
    width = TIMM_WIDTH if name in MORE_TIMM else WIDTH
    neurons = NEURON_COUNTS.get(name, INNER)
    blocks = {block: {"heads": (HEADS, width // HEADS), "neurons": (neurons, 1)} for block in range(BLOCKS)}
    if name in SWINS:  # two blocks, what merges patches, two blocks of twice the width
        head = 6 if name == "timm-swin-padded" else 0
        blocks = {
            block: {"heads": (HEADS, head or w // HEADS), "neurons": (2 * w, 1)}
            for block, w in {0: WIDTH, 1: WIDTH, 3: 2 * WIDTH, 4: 2 * WIDTH}.items()
        }
    if name in SHARED:  # the sites stand in the first block of those that share a module
        blocks = dict.fromkeys(SHARED[name], blocks[0])
    if name in (*ENCODER_DECODERS, "whisper"):
        for block in range(BLOCKS, len(model.anatomy.blocks)):
            blocks[block] = {kind: blocks[0].get(kind, (HEADS, 8)) for kind in ("heads", "cross", "neurons")}
    assert [(site.name, site.units, site.width) for site in model.anatomy] == [
        (f"blocks.{block}.{kind}", *sizes)
        for block, kinds in blocks.items()
        for kind, sizes in kinds.items()
        if kind == "neurons" or name not in NEURONS_ALONE
    ]


@every_family
@examples(4)  # the first one is trivial
@given(data=st.data())
def test_a_sliced_model_computes_and_costs_what_the_anatomy_says(name, data):
    model = shared_model(name)
    keep = data.draw(keep_sets(model.anatomy))
    smaller = sliced(model, keep)
    found = outputs(model, smaller, random_inputs(model))
    torch.testing.assert_close(found, masked_outputs(model, keep), rtol=0, atol=1e-5)

    after = dissect(smaller, model.family)
    kept = {site.name: len(keep.get(site.name, range(site.units))) for site in model.anatomy}
    assert {site.name: site.units for site in after} == kept
    counted, tokens = counted_macs(model, smaller)
    rest = 0.0  # of what is never pruned: the attention, where heads are left out, and what merges patches
    nothing = sliced(model, {s.name: [] for s in model.anatomy})
    if name in (*NEURONS_ALONE, *SWINS, *CNNS, *SEGMENTERS):
        rest = counted_macs(model, nothing)[0]
    assert after.macs(tokens) == pytest.approx(counted - rest, rel=0.01)
    assert model.anatomy.macs(tokens, kept) == pytest.approx(after.macs(tokens))  # before it is sliced
    assert parameters(smaller) - parameters(nothing) == sum(s.params(s.units) for s in after)
    removed = sum(site.params(site.units) - site.params(kept[site.name]) for site in model.anatomy)
    assert parameters(smaller) <= parameters(model.module) - removed
    if not is_shared(model):
        assert parameters(smaller) == parameters(model.module) - removed


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


class AttentionOfSomething(TorchFunctionMode):
    """Refuses attention without heads: up to 2.11 at least, torch divides by their number, and the process ends."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            assert (*args, *kwargs.values())[0].numel()
        return func(*args, **kwargs)


@every_family
@pytest.mark.parametrize("kept", [[], [2]], ids=["none", "one"])
def test_sites_with_no_unit_or_one_unit_left_work(name, kept):
    model = shared_model(name)
    keep = {site.name: kept for site in model.anatomy}
    smaller = sliced(model, keep)
    with AttentionOfSomething():
        found = outputs(model, smaller, random_inputs(model))
    # a norm behind a single neuron makes its rounding error as large as itself
    atol = 1e-3 if name.startswith(("gemma2", "gemma3")) else 1e-5
    torch.testing.assert_close(found, masked_outputs(model, keep), rtol=0, atol=atol)


@every_family
def test_each_site_changes_the_output(name):
    """Otherwise masked == sliced could hold for a mask that does nothing."""
    model = shared_model(name)
    dense = outputs(model, model.module, random_inputs(model))
    for site in model.anatomy:
        keep = {site.name: list(range(site.units // 2))}
        assert (masked_outputs(model, keep) - dense).abs().max() > 1e-4, site.name


@every_family
def test_a_skeleton_without_weights_gets_the_same_shapes(name):
    model = shared_model(name)
    keep = {site.name: list(range(0, site.units, 3)) for site in model.anatomy}
    skeleton = copy.deepcopy(model.module).to("meta")
    slice_model(skeleton, model.anatomy, keep)
    expected = {key: value.shape for key, value in sliced(model, keep).state_dict().items()}
    assert {key: value.shape for key, value in skeleton.state_dict().items()} == expected


@pytest.mark.parametrize(
    "name",
    [
        "beit",
        "dinov2",
        "dinov2-registers",
        "timm-deit-distilled",
        "timm-eva-rope",
        "swin",
        "timm-swin",
        "deberta",
        "deberta-v3",
        "modernbert",
        "albert",
        "albert-groups",
    ],
)
def test_bare_encoders_have_the_same_sites(name):
    whole = shared_model(name)
    bare = open_model(str(saved_model(name)), task="embedding", device="cpu")
    facts = [(s.name, s.units, s.macs_per_token, s.params_per_unit) for s in whole.anatomy]
    assert [(s.name, s.units, s.macs_per_token, s.params_per_unit) for s in bare.anatomy] == facts
    keep = {site.name: list(range(1, site.units, 2)) for site in bare.anatomy}
    found = outputs(bare, sliced(bare, keep), random_inputs(bare))
    torch.testing.assert_close(found, masked_outputs(bare, keep), rtol=0, atol=1e-5)
