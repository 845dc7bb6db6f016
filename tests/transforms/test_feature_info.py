"""timm's account of a CNN's channels, after slicing and after loading."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.lazy import Lazy
from helpers.models import opened, shared_model
from helpers.pruning import pruned

from optin_cli.loading.checkpoint import OpenModel
from optin_cli.transforms.feature_info import update_feature_info
from optin_cli.transforms.slicing import slice_model

timm_features = Lazy("timm.models._features")

CNNS = ["timm-vgg", "timm-vgg-bn", "timm-resnet", "timm-efficientnet"]


def half(model: OpenModel) -> dict[str, list[int]]:
    return {site.name: list(range(0, site.units, 2)) for site in model.anatomy}


def assert_true(module: torch.nn.Module) -> None:
    """What is said is what a forward gives."""
    image = torch.randn(1, *module.pretrained_cfg["input_size"])
    with torch.no_grad():
        features = module.forward_features(image)
        assert module.num_features == features.shape[1]
        assert module.head_hidden_size == module.forward_head(features, pre_logits=True).shape[1]
        nested = any("." in stage["module"] for stage in module.feature_info)
        stages = timm_features.FeatureListNet(
            copy.deepcopy(module), out_indices=range(len(module.feature_info)), flatten_sequential=nested
        )
        assert stages.feature_info.channels() == [stage.shape[1] for stage in stages(image)]


@pytest.mark.parametrize("name", CNNS)
def test_a_sliced_cnn_says_its_own_channels(name):
    model = shared_model(name)
    sliced = copy.deepcopy(model.module)
    slice_model(sliced, model.anatomy, half(model))
    assert_true(sliced)


def test_slicing_changes_what_a_vgg_says():
    model = shared_model("timm-vgg")
    sliced = copy.deepcopy(model.module)
    slice_model(sliced, model.anatomy, half(model))
    assert [s["num_chs"] for s in sliced.feature_info] != [s["num_chs"] for s in model.module.feature_info]


@pytest.mark.parametrize("name", ["timm-vgg", "timm-resnet"])
def test_a_written_cnn_says_them_too(name, tmp_path):
    _, _, applied = pruned(name, tmp_path)
    assert_true(opened(applied.path).module)


@pytest.mark.parametrize("name", CNNS)
def test_what_timm_says_of_a_dense_model_is_what_is_read(name):
    module = copy.deepcopy(shared_model(name).module)
    said = copy.deepcopy(module.feature_info), module.num_features, module.head_hidden_size
    update_feature_info(module)
    assert (module.feature_info, module.num_features, module.head_hidden_size) == said
