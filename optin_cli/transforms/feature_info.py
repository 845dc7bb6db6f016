"""Keep timm's own account of a CNN's channels true after slicing.

timm's models say in `feature_info` how many channels each of their stages gives, and in `num_features` and
`head_hidden_size` how wide their features are. Detectors, segmenters and `features_only` wrappers build on these.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

FEATURE_INFO = "feature_info"


def update_feature_info(module: nn.Module) -> None:
    """Read `feature_info`, `num_features` and `head_hidden_size` of a timm CNN from a forward without values.

    The forward runs on the meta device: it costs no arithmetic and works on a skeleton without weights, too. Models
    without `feature_info` (all others) are left alone.
    """
    owner: Any = module
    stages = getattr(module, FEATURE_INFO, None)
    if not isinstance(stages, list):
        return
    state = {name: tensor.to("meta") for name, tensor in module.state_dict(keep_vars=False).items()}
    size = owner.pretrained_cfg["input_size"]
    image = torch.empty(2, *size, device="meta", dtype=next(module.parameters()).dtype)
    channels: dict[str, int] = {}
    with ExitStack() as hooks, torch.no_grad():
        for stage in stages:
            watched = module.get_submodule(stage["module"])

            def see(_: nn.Module, __: Any, output: Tensor, name: str = stage["module"]) -> None:
                channels[name] = output.shape[1]

            hooks.callback(watched.register_forward_hook(see).remove)
        wrapped = {f"model.{name}": tensor for name, tensor in state.items()}
        features, pooled = functional_call(_Features(module), wrapped, (image,))
    for stage in stages:
        stage["num_chs"] = channels[stage["module"]]
    owner.num_features = features.shape[1]
    if hasattr(module, "head_hidden_size"):
        owner.head_hidden_size = pooled.shape[1]


class _Features(nn.Module):
    """The feature map of a timm model [batch, channels, height, width] and what its classifier reads of it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        features = self.model.forward_features(image)
        return features, self.model.forward_head(features, pre_logits=True)
