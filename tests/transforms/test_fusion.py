"""BatchNorms folded into the layers before them: the same outputs, and only where nothing else reads the layer."""

from __future__ import annotations

import pytest
import torch
from helpers.vgg import register_vggs
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import fusion as oracle

from optin_cli.transforms.fusion import FusedNorm, fuse_batch_norms


def lively(module: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics and weights of norms as training leaves them, not 0 and 1."""
    torch.manual_seed(seed)
    for one in module.modules():
        if isinstance(one, _BatchNorm):
            for tensor, low, high in (
                (one.running_mean, -0.5, 0.5),
                (one.running_var, 0.5, 2.0),
                (one.weight, 0.7, 1.3),
                (one.bias, -0.3, 0.3),
            ):
                nn.init.uniform_(tensor, low, high)
    return module.eval()


def difference(before: torch.Tensor, after: torch.Tensor) -> float:
    """The largest, as a share of the largest value."""
    return float((before - after).abs().max() / before.abs().max())


ALL = [
    ("timm", "resnet18"),
    ("timm", "vgg_tiny_bn"),
    ("timm", "tf_efficientnet_lite0"),
    ("timm", "mobilenetv3_small_050"),
    ("torchvision", "resnet18"),
    ("torchvision", "torchvision_vgg_tiny"),
    pytest.param("torchvision", "efficientnet_b0", marks=pytest.mark.slow),  # timm's has the same blocks
    ("torchvision", "mobilenet_v2"),
]


@pytest.mark.parametrize(("library", "name"), ALL, ids=lambda v: v)
@torch.inference_mode()
def test_every_norm_of_a_cnn_is_folded_and_the_outputs_stay(library, name):
    import timm
    import torchvision

    register_vggs()
    torch.manual_seed(0)
    model = timm.create_model(name) if library == "timm" else torchvision.models.get_model(name)
    lively(model)
    pixels = torch.randn(2, 3, 64, 64)
    expected, norms = model(pixels), [p for p, m in model.named_modules() if isinstance(m, _BatchNorm)]
    folded = fuse_batch_norms(model, {"x": pixels[:1]})
    assert sorted(folded) == sorted(norms) and norms
    assert not any(isinstance(one, _BatchNorm) for one in model.modules())
    assert difference(expected, model(pixels)) < 1e-5


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x))


def test_weights_are_those_of_torchs_own_folding():
    model = lively(Chain())
    expected = oracle.fuse_conv_bn_eval(model.conv, model.norm)
    assert fuse_batch_norms(model, {"x": torch.zeros(1, 3, 8, 8)}) == ["norm"]
    assert isinstance(model.norm, FusedNorm)
    torch.testing.assert_close(model.conv.weight, expected.weight)
    torch.testing.assert_close(model.conv.bias, expected.bias)


class ReadTwice(Chain):
    def forward(self, x):
        made = self.conv(x)
        return self.norm(made) + made


class RunTwice(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.conv(self.norm(self.conv(x))))


class LayerTwice(RunTwice):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.conv(x)) + self.other(self.conv(x))


class NormFirst(Chain):
    def forward(self, x):
        return self.conv(self.norm(x))

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)


class Activated(Chain):
    def forward(self, x):
        return self.norm(torch.relu(self.conv(x)))


@pytest.mark.parametrize("kind", [ReadTwice, RunTwice, LayerTwice, NormFirst, Activated])
def test_a_norm_stays_where_folding_would_change_the_output(kind):
    model = lively(kind())
    pixels = torch.randn(2, 3, 9, 9)
    expected = model(pixels)
    assert fuse_batch_norms(model, {"x": pixels}) == []
    assert torch.equal(model(pixels), expected)


def test_linear_layers_take_norms_too():
    model = lively(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU()))
    rows = torch.randn(6, 5)
    expected = model(rows)
    assert fuse_batch_norms(model, {"input": rows}) == ["1"]
    torch.testing.assert_close(model(rows), expected)


def test_a_module_in_training_is_refused():
    with pytest.raises(ValueError, match="training"):
        fuse_batch_norms(Chain().train(), {"x": torch.zeros(1, 3, 8, 8)})
