"""Train the zoo's convolutional networks on CIFAR-10 from scratch.

    python benchmarks/zoo/cnn_cifar10.py resnet|vgg --data FOLDER --output FOLDER [--epochs N]

The result is a directory in timm's own layout, which every optin command opens. The same command goes on
where an interrupted run stopped; --epochs may then move the end of the schedule. README.md is the model card.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from cifar10 import CLASSES, Recipe, cifar_parser, train_and_export
from torch import Tensor, nn
from torch.nn import functional as F

# timm's stems make a ResNet's maps four times smaller than its images, so it sees enlarged ones
MODELS: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "resnet": (
        "resnet18",
        {"layers": [2, 2, 2, 2], "channels": [32, 64, 128, 128], "stem_type": "deep", "stem_width": 12},
        64,
        15,
    ),
    "vgg": ("vgg11_bn", {"mlp_ratio": 1 / 64}, 32, 8),
}
"""Name -> (architecture, arguments, side of the images, epochs)."""
PEAKS, DECAYS = {"resnet": 0.4, "vgg": 1e-3}, {"resnet": 5e-4, "vgg": 0.05}
"""Of the learning rate; of weights."""


class _Convolution(torch.autograd.Function):
    """A convolution whose weight's gradient is one matrix product over patches.

    oneDNN's own takes up to 15 times as long in bfloat16 where there are 128 channels or more.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, None, stride, padding)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        s, p = ctx.stride, ctx.padding
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        by_input, *_ = torch.ops.aten.convolution_backward(
            gradient, x, weight, None, [s, s], [p, p], [1, 1], False, [0, 0], 1, [True, False, False]
        )
        outputs, inputs, kernel, _ = weight.shape
        rows = gradient.permute(0, 2, 3, 1).reshape(-1, outputs)
        patches = F.pad(x.permute(0, 2, 3, 1), (0, 0, p, p, p, p)).unfold(1, kernel, s).unfold(2, kernel, s)
        columns = patches.permute(0, 1, 2, 4, 5, 3).reshape(len(rows), -1)  # (n * h * w, taps * inputs)
        by_weight = (rows.T @ columns).view(outputs, kernel, kernel, inputs).permute(0, 3, 1, 2)
        return by_input, by_weight, None, None


class _Conv2d(nn.Conv2d):
    """Runs as `_Convolution` in training."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and torch.is_autocast_enabled(x.device.type)):
            return super().forward(x)
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype, memory_format=torch.channels_last), self.weight.to(dtype)
        found = _Convolution.apply(x, weight, self.stride[0], self.padding[0])
        return found if self.bias is None else found + self.bias.to(dtype).view(1, -1, 1, 1)


def new_model(name: str) -> nn.Module:
    """A model whose convolutions of 64 channels and more learn fast on a CPU."""
    architecture, args, *_ = MODELS[name]
    model = timm.create_model(architecture, num_classes=CLASSES, **args)
    for module in model.modules():
        if type(module) is nn.Conv2d and module.in_channels >= 64:
            module.__class__ = _Conv2d
    return model.to(memory_format=torch.channels_last)


def new_optimizers(model: nn.Module, name: str) -> list[torch.optim.Optimizer]:
    """Nesterov's momentum; AdamW for the VGG, whose classifier without norms dies of it. Biases do not decay."""
    momentum, peak, decay = name == "resnet", PEAKS[name], DECAYS[name]
    weights = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]
    if momentum:
        return [torch.optim.SGD(groups, lr=peak, momentum=0.9, nesterov=True, fused=True)]
    return [torch.optim.AdamW(groups, lr=peak, fused=True)]


def main() -> None:
    parser = cifar_parser(__doc__.splitlines()[0])
    parser.add_argument("model", choices=MODELS)
    settings = parser.parse_args()
    architecture, args, side, epochs = MODELS[settings.model]
    recipe = Recipe(
        architecture,
        args,
        lambda _: new_model(settings.model),
        lambda model: new_optimizers(model, settings.model),
        epochs=epochs,
        side=side,
    )
    train_and_export(recipe, settings)


if __name__ == "__main__":
    main()
