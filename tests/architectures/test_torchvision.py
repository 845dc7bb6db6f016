"""torchvision's classifiers: opened by name, sliced as masked, saved and loaded."""

from __future__ import annotations

import json
from urllib.error import URLError

import numpy as np
import pytest
import torch
from helpers.cli import run
from helpers.data import tiny_image_folder
from helpers.lazy import Lazy
from helpers.models import calm, new_torchvision
from helpers.runs import macs_of
from safetensors.torch import save_file

from optin_cli.architectures.resolve import dissect, family_of
from optin_cli.errors import InputError, UnknownArchitecture, UsageError
from optin_cli.execution.macs import observed_tokens
from optin_cli.loading.checkpoint import open_model, open_module
from optin_cli.loading.sources import resolve
from optin_cli.transforms.masking import masked, masks_from_keep
from optin_cli.transforms.slicing import slice_model

models = Lazy("torchvision.models")

# architecture -> (arguments that make it small, family, kinds)
ARCHITECTURES = {
    "resnet18": ({}, "resnet", {"channels"}),
    "mobilenet_v2": ({"width_mult": 0.35}, "torchvision-mobilenet-v2", {"channels"}),
    "mobilenet_v3_small": ({}, "torchvision-mobilenet-v3", {"channels"}),
    "efficientnet_b0": ({}, "torchvision-efficientnet", {"channels"}),
    "efficientnet_v2_s": ({}, "torchvision-efficientnet", {"channels"}),
    "convnext_tiny": ({}, "torchvision-convnext", {"neurons"}),
    "vit_b_32": ({"image_size": 64}, "torchvision-vit", {"neurons"}),
    "swin_t": ({}, "torchvision-swin", {"neurons"}),
    "swin_v2_t": ({}, "torchvision-swin", {"neurons"}),
}


def new_calm(name: str, **args) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return calm(models.get_model(name, weights=None, num_classes=5, **args).eval())


QUICK = ("resnet18", "mobilenet_v2")  # the others are in test_all_families, smaller


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in ARCHITECTURES]
)
def test_sliced_is_masked_and_macs_are_counted(name, tmp_path):
    args, family, kinds = ARCHITECTURES[name]
    file = tmp_path / "weights.safetensors"
    save_file(new_calm(name, **args).state_dict(), file)
    query = "&".join(f"{key}={value}" for key, value in {"image_size": 64, **args}.items())
    model = open_model(f"torchvision:{name}?checkpoint={file}&num_classes=5&{query}", device="cpu")
    anatomy, rng = model.anatomy, np.random.default_rng(0)
    assert (model.family.name, {site.kind for site in anatomy}) == (family, kinds)
    keep = {s.name: sorted(rng.choice(s.units, s.units // 2, replace=False).tolist()) for s in anatomy}
    keep[anatomy.sites[1].name] = []
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), masked(model.module, anatomy, masks_from_keep(anatomy, keep)):
        expected = model.module(images)
    dense, tokens = macs_of(model.module, images[:1]), observed_tokens(model, {"x": images[:1]})
    before = anatomy.macs(tokens)
    slice_model(model.module, anatomy, keep)
    with torch.no_grad():
        torch.testing.assert_close(model.module(images), expected, rtol=1e-5, atol=1e-5)
    saved = before - dissect(model.module, model.family).macs(tokens)
    assert dense - macs_of(model.module, images[:1]) == pytest.approx(saved, rel=0.01)


def test_a_model_is_pruned_and_loaded_through_the_commands(tmp_path):
    args = {"width_mult": 0.1}
    file = tmp_path / "weights.pth"
    torch.save(new_torchvision("mobilenet_v2", **args).state_dict(), file)
    spec = f"torchvision:mobilenet_v2?checkpoint={file}&num_classes=5&image_size=32&width_mult=0.1"
    data = tiny_image_folder(tmp_path / "images", 20)
    settings = ("--samples", "12", "--method", "curvature", "--device", "cpu")
    target = tmp_path / "m"
    command = ["prune", spec, "--data", str(data), "--flops", "0.6", "-o", str(target), *settings]
    run(*command, "--ranking", tmp_path / "r.h5")
    config = json.loads((target / "config.json").read_text())
    assert (config["library"], config["architecture"]) == ("torchvision", "mobilenet_v2")
    pruned = open_model(str(target), device="cpu")
    assert pruned.processor.transform.transforms[0].size == 32
    assert "mobilenet_v2 (torchvision)" in run("inspect", target).stdout
    assert sum(p.numel() for p in pruned.module.parameters()) < sum(
        p.numel() for p in open_model(spec, device="cpu").module.parameters()
    )


def test_the_transform_is_that_of_the_weights(monkeypatch):
    """By name the default weights come from the hub, here from nowhere."""
    known = models.get_model("resnet18", weights=None)
    asked = []

    def get_state_dict(self, **_):
        asked.append(self)
        return known.state_dict()

    monkeypatch.setattr(models.ResNet18_Weights, "get_state_dict", get_state_dict)
    model = open_model("torchvision:resnet18", device="cpu")
    assert asked == [models.ResNet18_Weights.DEFAULT]
    resize, crop = model.processor.transform.transforms[:2]
    assert (resize.size, tuple(crop.size)) == (256, (224, 224))
    torch.testing.assert_close(model.module.fc.weight, known.fc.weight)


def test_names_and_weights_that_do_not_fit(tmp_path):
    with pytest.raises(UsageError, match="no image classifier 'resnet81'") as refused:
        resolve("torchvision:resnet81")
    assert "resnet18" in refused.value.hint
    with pytest.raises(UsageError, match="no image classifier"):
        resolve("torchvision:maskrcnn_resnet50_fpn")
    with pytest.raises(UsageError, match="no checkpoint"):
        resolve(f"torchvision:resnet18?checkpoint={tmp_path / 'none.pth'}")
    file = tmp_path / "weights.safetensors"
    save_file(new_torchvision("mobilenet_v2", 7, width_mult=0.1).state_dict(), file)
    with pytest.raises(InputError, match=r"does not fit torchvision's mobilenet_v2: 2 of another shape"):
        open_model(f"torchvision:mobilenet_v2?checkpoint={file}&width_mult=0.1&num_classes=5")
    with pytest.raises(UsageError, match="torchvision model can't do embedding"):
        open_model(f"torchvision:mobilenet_v2?checkpoint={file}&width_mult=0.1", task="embedding")


def test_a_classifier_without_a_linear_can_be_traced(tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file(new_torchvision("squeezenet1_1", 5).state_dict(), file)
    with pytest.raises(UnknownArchitecture, match="SqueezeNet"):
        open_model(f"torchvision:squeezenet1_1?checkpoint={file}&num_classes=5")
    _, module, _, _ = open_module("torchvision:squeezenet1_1?num_classes=5", weights=False)
    assert module.num_features == 512


def test_a_download_tells_nothing_on_stdout(monkeypatch, capsys):
    def offline(url, *_, **__):
        print(f"Downloading: {url}")
        raise URLError("no connection")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(InputError, match="can't be fetched") as caught:
        open_model("torchvision:resnet18")
    assert "torchvision:NAME?checkpoint=FILE" in caught.value.hint
    told = capsys.readouterr()
    assert told.out == "" and "Downloading" in told.err


def test_libraries_share_names_but_not_tables():
    assert family_of(new_torchvision("convnext_tiny")).name == "torchvision-convnext"
    with pytest.raises(UnknownArchitecture):
        family_of(new_torchvision("squeezenet1_0"))
