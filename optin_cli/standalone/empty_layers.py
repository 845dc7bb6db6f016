"""Convolutions, norms and pooling that lost their last channel: torch does not run them, or not right."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from optin_cli.standalone.sizes import CHANGES, noted


class EmptyConv2d(nn.Conv2d):
    """A convolution without inputs or outputs: it gives its bias alone."""

    pads_same: bool

    def forward(self, x: Tensor) -> Tensor:
        zeros = x.new_zeros(x.shape[0], self.out_channels, *output_size(self, (x.shape[-2], x.shape[-1])))
        return zeros if self.bias is None else zeros + self.bias[:, None, None]


class EmptyPool2d(nn.Module):
    """Pooling of no channels."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.new_zeros(len(x), 1, *x.shape[2:]))[:, :0]


class EmptyMaxPool2d(EmptyPool2d, nn.MaxPool2d):
    pass


class EmptyAvgPool2d(EmptyPool2d, nn.AvgPool2d):
    pass


class EmptyBatchNorm2d(nn.BatchNorm2d):
    """The norm of no channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def output_size(layer: nn.Conv2d, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) that a convolution gives for an image of `size`."""
    sides = []
    for axis in (0, 1):
        reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
        if pads_same(layer):
            sides.append(-(-size[axis] // layer.stride[axis]))
        else:
            padding = 0 if isinstance(layer.padding, str) else layer.padding[axis]
            sides.append((size[axis] + 2 * padding - reach - 1) // layer.stride[axis] + 1)
    return sides[0], sides[1]


def pads_same(layer: nn.Conv2d) -> bool:
    """True if there is one position of the output for each step, however large the kernel is."""
    return bool(layer.padding == "same" or is_a(layer, "Conv2dSame") or getattr(layer, "pads_same", False))


def is_a(module: nn.Module, name: str) -> bool:
    """True for a module of the class `name`, or of one made from it, of a library that may not be there."""
    return any(cls.__name__ == name for cls in type(module).__mro__)


_EMPTY: dict[Any, Any] = {
    nn.Conv2d: EmptyConv2d,
    nn.BatchNorm2d: EmptyBatchNorm2d,
    nn.MaxPool2d: EmptyMaxPool2d,
    nn.AvgPool2d: EmptyAvgPool2d,
}


def run_empty(layer: Any) -> None:
    """Turn a layer that lost its last input or output into one that runs."""
    empty = next((empty for kind, empty in _EMPTY.items() if isinstance(layer, kind)), None)
    if is_a(layer, "Conv1D"):  # GPT-2's Linear
        empty = type("EmptyConv1D", (layer.__class__,), {"forward": _through_linear})
    if empty is None or hasattr(layer, "optin_runs"):
        return
    if empty is EmptyConv2d:
        layer.pads_same = pads_same(layer)
    layer.__class__ = empty
    noted(layer, "empty")


def _through_linear(layer: Any, x: Tensor) -> Tensor:
    """A Conv1D without inputs or outputs, which `Conv1D.forward` can't reshape."""
    return F.linear(x, layer.weight.t(), layer.bias)


CHANGES["empty"] = run_empty
