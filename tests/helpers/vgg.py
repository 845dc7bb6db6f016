"""VGGs small enough for tests, under names that timm and torchvision build: neither library has arguments for it."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn


@cache
def register_vggs() -> None:
    """Make the three known to their libraries, which this imports."""
    import timm
    from timm.models import vgg as timm_vgg
    from torchvision import models
    from torchvision.models import _api
    from torchvision.models import vgg as torchvision_vgg

    def vgg_tiny_bn(pretrained: bool = False, **args: Any) -> nn.Module:
        """Its last map is larger than the classifier's kernel of 7."""
        return timm_vgg._create_vgg(
            "narrow_bn", pretrained, norm_layer=nn.BatchNorm2d, **{"mlp_ratio": 0.005, **args}
        )

    def vgg_tiny(pretrained: bool = False, **args: Any) -> nn.Module:
        """Its last map is smaller than the classifier's kernel of 7, and so is enlarged."""
        return timm_vgg._create_vgg("deep", pretrained, **{"mlp_ratio": 0.005, **args})

    def torchvision_vgg_tiny(*, weights: models.VGG11_BN_Weights | None = None, **args: Any) -> nn.Module:
        """With a BatchNorm behind every convolution, and a narrow classifier."""
        model = models.VGG(torchvision_vgg.make_layers([6, "M", 8, 10, "M"], batch_norm=True), **args)
        inner = model.classifier
        inner[0], inner[3] = nn.Linear(10 * 49, 24), nn.Linear(24, 20)
        inner[6] = nn.Linear(20, inner[6].out_features)
        return model

    # torchvision reads the weights' enum from the signature, which a postponed annotation of a local name hides
    torchvision_vgg_tiny.__annotations__["weights"] = models.VGG11_BN_Weights | None
    timm_vgg.cfgs |= {"narrow": [6, "M", 8, 10, "M"], "deep": [6, "M", 8, "M", 10, "M"]}
    for make in (vgg_tiny_bn, vgg_tiny):
        make.__module__ = __name__
        timm.models.register_model(make)
    _api.register_model()(torchvision_vgg_tiny)
