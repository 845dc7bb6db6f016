"""The layers a site is made of: what units cost in them, and how they are sliced. Linear, Conv2d and BatchNorm2d.

Between two layers units may pass activations and pooling, which hold nothing of them.

A unit of a Linear is a row or a column, of a Conv2d an output or an input channel with its whole kernel. GPT-2's
Conv1D is a Linear whose weight is [inputs, outputs].
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from optin_cli.errors import InputError
from optin_cli.standalone.empty_layers import output_size, pads_same, run_empty


@dataclass(frozen=True)
class Shape:
    """Sizes of a Linear, a Conv1D or a Conv2d."""

    inputs: int
    outputs: int
    taps: int
    """Weights between an input and an output, and its MACs at each position of the output: 1 for a Linear."""
    biased: bool


def is_transposed(layer: nn.Module) -> bool:
    """True for transformers' Conv1D: a Linear whose weight is [inputs, outputs]."""
    loaded: Any = sys.modules.get("transformers.pytorch_utils")  # timm's models need no import of it
    return loaded is not None and isinstance(layer, loaded.Conv1D)


def replaces_forward(module: nn.Module) -> bool:
    """Whether a forward in it is replaced, as where it is spread over devices: a copy would run the original."""
    return any("forward" in vars(part) for part in module.modules())


def is_linear(layer: nn.Module) -> bool:
    """True for a layer that maps the last axis of its input, whichever way its weight lies."""
    return isinstance(layer, nn.Linear) or is_transposed(layer)


def shape_of(layer: nn.Module, path: str) -> Shape:
    """Sizes of `layer`; raises `InputError` naming `path` when a site can't be made of it."""
    biased = getattr(layer, "bias", None) is not None
    if is_transposed(layer):
        inputs, outputs = layer.weight.shape  # type: ignore[misc]
        return Shape(inputs, outputs, 1, biased)
    if isinstance(layer, nn.Linear):
        return Shape(layer.in_features, layer.out_features, 1, biased)
    if isinstance(layer, nn.Conv2d):
        return Shape(layer.in_channels, layer.out_channels, math.prod(layer.kernel_size), biased)
    raise InputError(f"{path} is a {type(layer).__name__}; a site is made of Linear and Conv2d layers")


def is_grouped(layer: nn.Module) -> bool:
    """True for a convolution in groups: no single channel can leave it."""
    return isinstance(layer, nn.Conv2d) and layer.groups != 1


def is_depthwise(layer: nn.Module) -> bool:
    """True for a convolution that makes each channel of its output from the same channel of its input."""
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels == layer.out_channels


def carries_units(layer: nn.Module) -> bool:
    """True if each channel of the output is made from the same channel of the input alone."""
    return is_depthwise(layer) or isinstance(layer, nn.BatchNorm2d | nn.Identity)


def passes_units(layer: nn.Module) -> bool:
    """True for a single module whose output has each feature of the input at its place, made from it alone."""
    if any(layer.children()):
        return carries_units(layer)
    return carries_units(layer) or isinstance(layer, nn.Flatten | _POOLS | _ELEMENTWISE) or _is_timms(layer)


def holds_units(layer: nn.Module) -> bool:
    """True for a module that passes units and must know how many there are."""
    return isinstance(layer, nn.BatchNorm2d | nn.Conv2d | _POOLS)


_POOLS = nn.MaxPool2d | nn.AvgPool2d
_ELEMENTWISE = (
    nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d | nn.Dropout | nn.Dropout2d
    | nn.ReLU | nn.ReLU6 | nn.LeakyReLU | nn.ELU | nn.GELU | nn.SiLU | nn.Mish | nn.Hardswish | nn.Tanh | nn.Sigmoid
)  # fmt: skip


def _is_timms(layer: nn.Module) -> bool:
    """True for timm's own activations and its pooling of a whole map."""
    from timm.layers import activations, adaptive_avgmax_pool

    pooled = isinstance(layer, adaptive_avgmax_pool.FastAdaptiveAvgPool)
    return pooled or type(layer).__module__.startswith(activations.__name__)


def is_affine_norm(layer: nn.Module) -> bool:
    """True for a BatchNorm with a gain and a bias for each channel."""
    return isinstance(layer, nn.BatchNorm2d) and layer.affine and layer.track_running_stats


def carried_weights(layer: nn.Module) -> tuple[int, int]:
    """(MACs for each position of the output, parameters) of one channel of a module that carries units."""
    params = sum(p.numel() // max(1, p.shape[0]) for p in layer.parameters(recurse=False))
    return (math.prod(layer.kernel_size) if isinstance(layer, nn.Conv2d) else 0), params


def channel_axis(layer: nn.Module) -> int:
    """Return the channel axis of a layer's input and output, counted from the end: -1, or -3 for images."""
    return -3 if isinstance(layer, nn.Conv2d | nn.BatchNorm2d) else -1


def along(axis: int, values: Tensor) -> Tensor:
    """`values` [channels] shaped to multiply a tensor whose channels are at `axis`, counted from the end."""
    return values.reshape(-1, *[1] * (-axis - 1))


def by_output(layer: nn.Module) -> Tensor:
    """The weight, or a view of it, as [outputs, inputs, ...]."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.t() if is_transposed(layer) else weight


def matrix(layer: nn.Module) -> Tensor:
    """The weight as [outputs, inputs * taps]: an input owns `taps` neighbouring columns."""
    return by_output(layer).flatten(1)


def like_weight(layer: nn.Module, values: Tensor) -> Tensor:
    """Values in the order of `matrix`, [outputs, inputs * taps], shaped as the layer's weight."""
    shaped = values.reshape(by_output(layer).shape)
    return shaped.t().contiguous() if is_transposed(layer) else shaped


def padding_of(layer: nn.Conv2d, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Zeros that `layer` adds to an image of `size` (height, width): left, right, top, bottom."""
    sides: list[int] = []
    for axis in (1, 0):
        reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
        if pads_same(layer):
            steps = -(-size[axis] // layer.stride[axis]) - 1
            total = max(steps * layer.stride[axis] + reach + 1 - size[axis], 0)
            sides += [total // 2, total - total // 2]
        else:
            padding = 0 if isinstance(layer.padding, str) else layer.padding[axis]
            sides += [padding, padding]
    return sides[0], sides[1], sides[2], sides[3]


def patches(layer: nn.Module, x: Tensor) -> Tensor:
    """Return what each output position is a linear map of, [examples, positions, inputs * taps], as in `matrix`.

    `x` is what `layer` is given: [examples, inputs, height, width] for a Conv2d, [examples, ..., inputs] for a
    Linear; or [rows, inputs], which stay as they are.
    """
    if not isinstance(layer, nn.Conv2d):
        return x[:, None] if x.dim() == 2 else x.flatten(1, -2)
    size = x.shape[-2], x.shape[-1]
    if not x.shape[1]:  # torch unfolds no images without channels
        return x.new_zeros(len(x), math.prod(output_size(layer, size)), 0)
    padded = F.pad(x, padding_of(layer, size))
    return F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride).transpose(1, 2)


def select_outputs(layer: nn.Module, indices: Tensor) -> None:
    """Keep output features or channels, in place."""
    _select_ends(layer, indices, dim=0)


def select_inputs(layer: nn.Module, indices: Tensor) -> None:
    """Keep input features or channels, in place."""
    _select_ends(layer, indices, dim=1)


def select_carried(layer: nn.Module, indices: Tensor) -> None:
    """Keep channels of a BatchNorm, a depthwise convolution or pooling, in place."""
    for name in _BY_OUTPUT:
        select_slices(layer, name, 0, indices)
    if isinstance(layer, nn.BatchNorm2d):
        layer.num_features = len(indices)
    elif isinstance(layer, nn.Conv2d):
        layer.in_channels = layer.out_channels = layer.groups = len(indices)
    if not len(indices):
        run_empty(layer)


def select_slices(module: nn.Module, name: str, axis: int, indices: Tensor) -> None:
    """Keep slices of a parameter or buffer along an axis, in place; nothing where there is none of that name."""
    old = getattr(module, name, None)
    if old is None:
        return
    kept = old.detach().index_select(axis, indices.to(old.device)).contiguous()
    setattr(module, name, nn.Parameter(kept, old.requires_grad) if isinstance(old, nn.Parameter) else kept)


_BY_OUTPUT = ("weight", "bias", "running_mean", "running_var")


def _select_ends(layer: nn.Module, indices: Tensor, dim: int) -> None:
    """Keep outputs (dim 0) or inputs (dim 1) of a Linear, Conv1D or Conv2d."""
    transposed = is_transposed(layer)
    for name in ("weight",) if dim else _BY_OUTPUT:
        select_slices(layer, name, 1 - dim if transposed and name == "weight" else dim, indices)
    if transposed:
        setattr(layer, "nx" if dim else "nf", len(indices))
    else:
        what = "features" if isinstance(layer, nn.Linear) else "channels"
        setattr(layer, f"{'in' if dim else 'out'}_{what}", len(indices))
    if not len(indices):
        run_empty(layer)
