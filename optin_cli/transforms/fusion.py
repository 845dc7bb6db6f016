"""Fold BatchNorms into the layers before them, for inference: a norm with fixed statistics is a scale and a shift."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

Fusible = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


class FusedNorm(nn.Module):
    """What is left of a BatchNorm: nothing, or the activation that its module runs after the norm (timm)."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.drop: nn.Module = getattr(norm, "drop", None) or nn.Identity()
        self.act: nn.Module = getattr(norm, "act", None) or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(x))


def fuse_batch_norms(module: nn.Module, inputs: Mapping[str, Any]) -> list[str]:
    """Fold each BatchNorm of a module in eval mode into the convolution or linear layer that alone feeds it, in place.

    With weights W and bias b of the layer, and mean m, variance v, scale g and shift h of the norm, the layer gets
    W g / sqrt(v + eps) and (b - m) g / sqrt(v + eps) + h, computed in float64. `inputs` are any that the module takes:
    one forward shows which layer feeds which norm. A norm whose layer something else reads, or which runs more than
    once, stays. Returns the paths of the norms that are folded.
    """
    if module.training:
        raise ValueError("a module in training changes the statistics of its norms")
    names = {norm: path for path, norm in module.named_modules()}
    folded = []
    for layer, norm in _pairs(module, inputs):
        _fold(layer, norm)
        path = names[norm]
        owner, _, name = path.rpartition(".")
        setattr(module.get_submodule(owner), name, FusedNorm(norm))
        folded.append(path)
    return folded


@torch.no_grad()
def _fold(layer: Fusible, norm: _BatchNorm) -> None:
    assert norm.running_mean is not None and norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.double()
    shift = 0 if norm.bias is None else norm.bias.double()
    weight = layer.weight.double() * scale.reshape(-1, *[1] * (layer.weight.dim() - 1))
    bias = ((0 if layer.bias is None else layer.bias.double()) - norm.running_mean.double()) * scale + shift
    layer.weight = nn.Parameter(weight.to(layer.weight.dtype), layer.weight.requires_grad)
    layer.bias = nn.Parameter(bias.to(layer.weight.dtype), layer.weight.requires_grad)


def _pairs(module: nn.Module, inputs: Mapping[str, Any]) -> list[tuple[Fusible, _BatchNorm]]:
    """Layers with the norm that alone reads what they give, each of them running once in a forward."""
    made: dict[int, Fusible] = {}  # id of an output -> its layer
    fed: dict[
        nn.Module, list[Fusible | None]
    ] = {}  # norm -> the layer that fed it, for each time that it ran
    kept: list[Tensor] = []  # an id is of one tensor only while that lives

    def gave(layer: Any, _: Any, output: Tensor) -> None:
        made[id(output)] = layer
        kept.append(output)

    def reads(norm: Any, given: tuple[Tensor, ...]) -> None:
        fed.setdefault(norm, []).append(made.get(id(given[0])))

    handles = []
    for one in module.modules():
        if isinstance(one, Fusible) and not isinstance(one, torch.nn.modules.lazy.LazyModuleMixin):
            handles.append(one.register_forward_hook(gave))
        elif isinstance(one, _BatchNorm) and one.running_mean is not None and not one.training:
            handles.append(one.register_forward_pre_hook(reads))
    try:
        with _Readers(made) as readers, torch.no_grad():
            module(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    runs: dict[Fusible, int] = {}
    for layer in made.values():
        runs[layer] = runs.get(layer, 0) + 1
    found = []
    for norm, layers in fed.items():
        only = layers[0] if len(layers) == 1 else None
        if only is not None and runs[only] == readers.counts[only] == 1 and isinstance(norm, _BatchNorm):
            found.append((only, norm))
    return found


class _Readers(TorchFunctionMode):
    """Counts the calls that compute with what each layer gave."""

    _LOOKS = frozenset({"__get__", "size", "dim", "__len__", "stride", "is_floating_point", "numel"})

    def __init__(self, made: Mapping[int, Fusible]) -> None:
        super().__init__()
        self.made = made
        self.counts: dict[Fusible, int] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Iterable[Any] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") not in self._LOOKS:
            for given in _tensors([*args, *(kwargs or {}).values()]):
                if (layer := self.made.get(id(given))) is not None:
                    self.counts[layer] = self.counts.get(layer, 0) + 1
        return func(*args, **(kwargs or {}))


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
