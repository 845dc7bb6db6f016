"""The tables of torchvision's classifiers. Its ResNet is described by the table it shares with timm."""

from __future__ import annotations

from dataclasses import replace

from optin_cli.architectures.schema import Family, SiteTable, linears
from optin_cli.structure.anatomy import CHANNELS, NCHW, NEURONS, NHWC, RATIO, Producer

_MLP = SiteTable(NEURONS, producers=linears("mlp.0"), consumer="mlp.3", requires=("mlp",))

_MOBILENET_V2_SITES = (
    SiteTable(
        CHANNELS,
        producers=linears("conv.0.0"),
        carried=("conv.0.1", "conv.1.0", "conv.1.1"),
        consumer="conv.2",
        norm="conv.3",
        requires=("conv.3",),
    ),
)

_EXPANDED = SiteTable(  # expansion, depthwise convolution, projection
    CHANNELS,
    producers=linears("block.0.0"),
    carried=("block.0.1", "block.1.0", "block.1.1"),
    consumer="block.2.0",
    norm="block.2.1",
    requires=("block.1.0", "block.2.0"),
)
_SQUEEZED = replace(  # with a squeeze-and-excite before the projection
    _EXPANDED,
    producers=(*_EXPANDED.producers, Producer("block.2.fc2")),
    consumer="block.3.0",
    norm="block.3.1",
    readers=("block.2.fc1",),
    masked_at="block.2",
    requires=("block.2.fc1", "block.3.0"),
)
_FUSED = SiteTable(  # expansion by a whole convolution, projection
    CHANNELS,
    producers=linears("block.0.0"),
    carried=("block.0.1",),
    consumer="block.1.0",
    norm="block.1.1",
    requires=("block.1.0",),
)

_VGG_SITES = (
    SiteTable(CHANNELS, requires=("out_channels",)),
    SiteTable(CHANNELS, consumer="0", requires=("0.in_features", "6")),
    SiteTable(NEURONS, name="neurons1", consumer="3", requires=("3.in_features",)),
    SiteTable(NEURONS, name="neurons2", consumer="6", requires=("6.in_features",)),
)

TORCHVISION = (
    Family(
        "torchvision-vgg",
        ("torchvision.VGG",),
        ("features.*", "avgpool", "classifier"),
        _VGG_SITES,
        "image",
        note="without residuals: a site is between a convolution and the next",
        layout=NCHW,
        hierarchical=True,
    ),
    Family(
        "torchvision-mobilenet-v2",
        ("torchvision.MobileNetV2",),
        ("features.*",),
        _MOBILENET_V2_SITES,
        "image",
        layout=NCHW,
        hierarchical=True,
    ),
    Family(
        "torchvision-mobilenet-v3",
        ("torchvision.MobileNetV3",),
        ("features.*",),
        (_SQUEEZED, _EXPANDED),
        "image",
        layout=NCHW,
        hierarchical=True,
    ),
    Family(
        "torchvision-efficientnet",
        ("torchvision.EfficientNet",),
        ("features.[1-7].*",),
        (_SQUEEZED, _EXPANDED, _FUSED),
        "image",
        layout=NCHW,
        hierarchical=True,
    ),
    Family(
        "torchvision-convnext",
        ("torchvision.ConvNeXt",),
        ("features.[1-7].*",),
        (SiteTable(NEURONS, producers=linears("block.3"), consumer="block.5", requires=("block",)),),
        "image",
        layout=NCHW,
        hierarchical=True,
    ),
    Family(
        "torchvision-vit",
        ("torchvision.VisionTransformer",),
        "encoder.layers",
        (_MLP,),
        "image",
        note="neurons alone: nn.MultiheadAttention has a fixed width",
    ),
    Family(
        "torchvision-swin",
        ("torchvision.SwinTransformer",),
        ("features.[1357].*", "features.[246]"),
        (replace(_MLP, config={"mlp_ratio": RATIO}),),
        "image",
        note="neurons alone: its attention has a fixed width",
        layout=NHWC,
        hierarchical=True,
    ),
)
