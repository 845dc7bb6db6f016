"""The tables of convolutional networks, whose units are channels within a residual block."""

from __future__ import annotations

from dataclasses import replace

from optin_cli.architectures.schema import Family, SiteTable, linears
from optin_cli.architectures.vit import TIMM_NEURONS
from optin_cli.structure.anatomy import CHANNELS, NCHW, NEURONS, Producer

_BASIC_BLOCK = SiteTable(
    CHANNELS,
    producers=linears("conv1"),
    carried=("bn1",),
    consumer="conv2",
    norm="bn2",
    must_be_identity=("aa", "conv3"),
)
_BOTTLENECK = (
    SiteTable(
        CHANNELS,
        name="channels1",
        producers=linears("conv1"),
        carried=("bn1",),
        consumer="conv2",
        norm="bn2",
        requires=("conv3",),
    ),
    SiteTable(
        CHANNELS,
        name="channels2",
        producers=linears("conv2"),
        carried=("bn2",),
        consumer="conv3",
        norm="bn3",
        must_be_identity=("aa",),
        requires=("conv3",),
    ),
)
_RESNET_SITES = (_BASIC_BLOCK, *_BOTTLENECK)

# transformers' ResNet, a backbone of others: convolution and norm in one module of a list
_TRANSFORMERS_BOTTLENECK = tuple(
    SiteTable(
        CHANNELS,
        name=f"channels{number}",
        producers=linears(f"layer.{number - 1}.convolution"),
        carried=(f"layer.{number - 1}.normalization",),
        consumer=f"layer.{number}.convolution",
        norm=f"layer.{number}.normalization",
        requires=("layer.2.convolution",),
    )
    for number in (1, 2)
)
TRANSFORMERS_RESNET_SITES = (
    replace(
        _TRANSFORMERS_BOTTLENECK[0], name="", must_be_identity=("layer.2",), requires=("layer.1.convolution",)
    ),
    *_TRANSFORMERS_BOTTLENECK,
)

_INVERTED_RESIDUAL = SiteTable(
    CHANNELS,
    producers=linears("conv_pw"),
    carried=("bn1", "conv_dw", "bn2"),
    consumer="conv_pwl",
    norm="bn3",
    must_be_identity=("aa", "se"),
    requires=("conv_pw", "conv_pwl"),
)
_FUSED_INVERTED_RESIDUAL = SiteTable(
    CHANNELS,
    producers=linears("conv_exp"),
    carried=("bn1",),
    consumer="conv_pwl",
    norm="bn2",
    must_be_identity=("aa", "se"),
    requires=("conv_exp",),
)
_UNIVERSAL = SiteTable(  # MobileNet V4: a depthwise convolution before the expansion, behind it, or neither
    CHANNELS,
    producers=linears("pw_exp.conv"),
    carried=("pw_exp.bn", "dw_mid.conv", "dw_mid.bn"),
    consumer="pw_proj.conv",
    norm="pw_proj.bn",
    must_be_identity=("dw_mid.aa", "se"),
    requires=("pw_exp.conv", "dw_mid.conv", "pw_proj.conv"),
)
_EXPANSIONS = (
    _INVERTED_RESIDUAL,
    _FUSED_INVERTED_RESIDUAL,
    _UNIVERSAL,
    replace(
        _UNIVERSAL,
        carried=("pw_exp.bn",),
        must_be_identity=("se",),
        requires=("pw_exp.conv", "pw_proj.conv"),
    ),
)
_EFFICIENTNET_SITES = (
    *(
        replace(
            table,
            producers=(*table.producers, Producer("se.conv_expand")),
            readers=("se.conv_reduce",),
            masked_at="se",
            must_be_identity=tuple(path for path in table.must_be_identity if path != "se"),
            requires=(*table.requires, "se.conv_reduce"),
        )
        for table in _EXPANSIONS
    ),
    *_EXPANSIONS,
)

_PREACTIVATED = (  # a norm and an activation come before each convolution
    replace(_BASIC_BLOCK, carried=("norm2",), norm="", must_be_identity=("conv3",)),
    replace(_BOTTLENECK[0], carried=("norm2",), norm=""),
    replace(_BOTTLENECK[1], carried=("norm3",), norm="", must_be_identity=()),
)

# no residual: each layer reads what the one before makes
_VGG_SITES = (
    SiteTable(CHANNELS, requires=("out_channels",)),
    SiteTable(CHANNELS, consumer="fc1", requires=("fc1",)),
    SiteTable(NEURONS, consumer="fc2", requires=("fc2",)),
    SiteTable(NEURONS, consumer="fc", requires=("fc.in_features",)),
)

CNNS = (
    Family(
        "vgg",
        ("VGG",),
        ("features.*", "pre_logits", "head"),
        _VGG_SITES,
        "image",
        note="timm; without residuals: a site is between a convolution and the next",
        layout=NCHW,
        hierarchical=True,
    ),
    Family(
        "resnet",
        ("ResNet",),
        ("layer?.*",),
        _RESNET_SITES,
        "image",
        note="timm; grouped convolutions are left alone",
        layout=NCHW,
        hierarchical=True,
    ),
    Family(
        "resnetv2",
        ("ResNetV2",),
        ("stages.*.blocks.*",),
        _PREACTIVATED,
        "image",
        note="timm, with BatchNorms; BiT's group norms mix channels",
        layout=NCHW,
        hierarchical=True,
    ),
    Family(
        "efficientnet",
        ("EfficientNet", "MobileNetV3"),
        ("blocks.*.*",),
        _EFFICIENTNET_SITES,
        "image",
        note="timm's MobileNets too; squeeze-and-excites are sliced with the channels",
        layout=NCHW,
        hierarchical=True,
    ),
    Family(
        "timm-convnext",
        ("ConvNeXt",),
        ("stages.*.downsample", "stages.*.blocks.*"),
        (replace(TIMM_NEURONS[-1], requires=("mlp.fc1",), config={}),),
        "image",
        note="not V2, whose norm mixes neurons",
        layout=NCHW,
        hierarchical=True,
    ),
    Family(
        "convnext",
        ("convnext",),
        ("encoder.stages.*.downsampling_layer.*", "encoder.stages.*.layers.*"),
        (SiteTable(NEURONS, producers=linears("pwconv1"), consumer="pwconv2", requires=("pwconv1",)),),
        "image",
        layout=NCHW,
        hierarchical=True,
    ),
)
