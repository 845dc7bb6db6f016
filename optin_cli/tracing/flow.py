"""Find the outputs of layers that reach an input of a layer, by gradients that stop at the next layer before.

The output of every Linear, Conv1D and Conv2d becomes a leaf of the graph. The gradient of one input feature of a layer
then is nonzero at exactly those outputs that it is made of, whatever happens in between: activations, gates,
attention, norms, depthwise convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from optin_cli.structure.layers import carries_units, channel_axis, is_depthwise, is_linear
from optin_cli.tracing.record import forward

Sources = dict[str, frozenset[int]]
"""Path of a layer -> its output features that something is made of."""


def is_layer(module: nn.Module) -> bool:
    """True for what a site may begin and end at."""
    return is_linear(module) or (isinstance(module, nn.Conv2d) and not is_depthwise(module))


def outputs_of(module: nn.Module) -> int:
    """Features of what a layer, an embedding or a norm gives."""
    sizes = (
        getattr(module, name, None)
        for name in ("out_features", "out_channels", "nf", "embedding_dim", "num_features")
    )
    return next(size for size in sizes if size is not None)


def is_carrier(module: nn.Module) -> bool:
    """True for modules that may be between, with something for each unit."""
    return carries_units(module) and not isinstance(module, nn.Identity)


@dataclass
class Flow:
    """The graph of one forward pass, cut at all layers."""

    module: nn.Module
    leaves: dict[str, list[Tensor]] = field(default_factory=dict)
    """Path of a layer -> its outputs, one a call."""
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    carriers: dict[str, list[Tensor]] = field(default_factory=dict)
    """Path of a norm or depthwise convolution -> its outputs."""
    _generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(1))

    def sources(self, path: str, feature: int | None = None) -> tuple[Sources, list[str]]:
        """The sources of one input feature of a layer (or of all of them), and the carriers that it passed."""
        axis = channel_axis(self.module.get_submodule(path))
        total: Tensor | None = None
        for value in self.inputs.get(path, []):
            if value.requires_grad:
                chosen = value if feature is None else value.select(axis, feature)
                weights = torch.randn(chosen.shape, generator=self._generator)
                part = (chosen * weights.to(chosen)).sum()
                total = part if total is None else total + part
        if total is None:
            return {}, []
        return self._reached(total)

    def _reached(self, total: Tensor) -> tuple[Sources, list[str]]:
        names = [
            (path, t) for group in (self.leaves, self.carriers) for path, ts in group.items() for t in ts
        ]
        found = torch.autograd.grad(total, [t for _, t in names], retain_graph=True, allow_unused=True)
        sources: Sources = {}
        carriers: list[str] = []
        for (path, _), gradient in zip(names, found, strict=True):
            if gradient is None:
                continue
            features = _nonzero(gradient, channel_axis(self.module.get_submodule(path)))
            if features and path in self.carriers:
                carriers.append(path)
            elif features:
                sources[path] = sources.get(path, frozenset()) | features
        return sources, list(dict.fromkeys(carriers))


def _nonzero(gradient: Tensor, axis: int) -> frozenset[int]:
    rows = gradient.movedim(axis, 0).flatten(1) if gradient.dim() > 1 else gradient[:, None]
    return frozenset((rows != 0).any(1).nonzero()[:, 0].tolist())


def watch(module: nn.Module, inputs: dict[str, Any]) -> Flow:
    """Run `module` with its graph cut at all layers. Weights stay frozen."""
    flow = Flow(module)

    def cut(path: str) -> Any:
        def hook(_: nn.Module, args: Sequence[Tensor], output: Tensor) -> Tensor:
            if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
                flow.inputs.setdefault(path, []).append(args[0])
            leaf = output.detach().requires_grad_()
            flow.leaves.setdefault(path, []).append(leaf)
            return leaf.clone()  # what follows may work in place, which no leaf allows

        return hook

    def tap(path: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            if output.requires_grad:
                flow.carriers.setdefault(path, []).append(output)

        return hook

    with ExitStack() as stack, torch.enable_grad():
        for path, child in module.named_modules():
            if is_layer(child) or isinstance(child, nn.Embedding):
                stack.callback(child.register_forward_hook(cut(path)).remove)
            elif is_carrier(child):
                stack.callback(child.register_forward_hook(tap(path)).remove)
        forward(module, inputs)
    return flow
