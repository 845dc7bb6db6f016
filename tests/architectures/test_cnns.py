"""What the tables of convolutional networks take and what they leave out. test_all_*.py have the promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.data import tiny_image_folder
from helpers.families import TIMM_CNNS
from helpers.lazy import Lazy
from helpers.models import calm, randomise, saved_model
from helpers.runs import macs_of

from optin_cli.architectures.positions import count_positions, image_size
from optin_cli.architectures.resolve import dissect, family_of
from optin_cli.data.sources import DataSpec
from optin_cli.errors import InputError, UsageError
from optin_cli.loading.checkpoint import open_model
from optin_cli.scoring.plan import ScoreSettings, make_plan
from optin_cli.standalone.empty_layers import EmptyConv2d
from optin_cli.transforms.masking import masked, masks_from_keep
from optin_cli.transforms.slicing import slice_model

timm = Lazy("timm")


def anatomy_of(name: str, **args):
    model = timm.create_model(name, **args).eval()
    return dissect(model, family_of(model))


@pytest.mark.parametrize("name", TIMM_CNNS)
def test_units_are_the_inputs_of_the_consumer(name):
    model = open_model(str(saved_model(name)), device="cpu")
    for site in model.anatomy:
        assert site.units == model.module.get_submodule(site.consumer).weight.shape[1]
        assert site.width == 1


def test_a_bottleneck_has_two_sites_and_a_basic_block_one():
    anatomy = anatomy_of("test_resnet")
    labels = [[site.label for site in anatomy.in_block(block)] for block in range(4)]
    assert labels == [["channels"], ["channels"], ["channels1", "channels2"], ["channels"]]


def test_what_can_lose_no_channel_is_left_out():
    with pytest.raises(InputError, match="nothing is prunable"):
        anatomy_of("resnext50_32x4d")
    plain = {site.name for site in anatomy_of("resnet26")}
    blurred = {site.name for site in anatomy_of("resnet26", aa_layer=timm.layers.BlurPool2d)}
    # a blur stands behind the second convolution of the blocks that halve the image
    assert plain - blurred == {f"blocks.{block}.channels2" for block in (2, 4, 6)}
    with pytest.raises(InputError, match="nothing is prunable"):
        anatomy_of("convnextv2_atto")


def test_same_padding_survives_an_empty_site():
    """TensorFlow's padding depends on the size of the image: an empty convolution must give as many positions."""
    model = randomise(timm.create_model("tf_mobilenetv3_small_minimal_100", num_classes=5)).eval()
    anatomy = dissect(model, family_of(model))
    keep = {site.name: [] for site in anatomy}
    x = torch.randn(2, 3, 45, 38)
    with torch.no_grad(), masked(model, anatomy, masks_from_keep(anatomy, keep)):
        expected = model(x)
    slice_model(model, anatomy, keep)
    assert any(isinstance(module, EmptyConv2d) for module in model.modules())
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["knowledge", "reference"])
def test_methods_about_transformers_refuse_channels(method, tmp_path):
    model = open_model(str(saved_model("timm-resnet")), device="cpu")
    data = DataSpec(str(tiny_image_folder(tmp_path / "images")))
    with pytest.raises(UsageError, match="does not score channels"):
        make_plan(model, data, ScoreSettings(method=method, samples=8))


@pytest.mark.parametrize("name", ["mobilenetv4_conv_small_035", "mobilenetv4_hybrid_medium", "resnetv2_18d"])
def test_further_blocks_sliced_are_masked_and_their_macs_counted(name):
    model = calm(timm.create_model(name, num_classes=5)).eval()
    anatomy = dissect(model, family_of(model))
    rng = np.random.default_rng(0)
    keep = {s.name: sorted(rng.choice(s.units, s.units // 2, replace=False).tolist()) for s in anatomy}
    keep[anatomy.sites[1].name] = []
    x = torch.randn(1, 3, *image_size(model))
    before, tokens = macs_of(model, x), count_positions(model, anatomy.blocks[0], "nchw").reference
    with torch.no_grad(), masked(model, anatomy, masks_from_keep(anatomy, keep)):
        expected = model(x)
    slice_model(model, anatomy, keep)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    after = dissect(model, family_of(model))
    saved = anatomy.macs(tokens) - after.macs(tokens)
    assert before - macs_of(model, x) == pytest.approx(saved, rel=0.01)


def test_blurs_and_norms_over_channels_leave_sites_out():
    plain, blurred = (len(anatomy_of(f"mobilenetv4_conv_{kind}medium").sites) for kind in ("", "blur_"))
    assert blurred < plain
    with pytest.raises(InputError, match="nothing is prunable"):
        anatomy_of("resnetv2_50x1_bit")
