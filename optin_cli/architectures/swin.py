"""The tables of hierarchical transformers: stages of blocks, between them what merges patches."""

from __future__ import annotations

from dataclasses import replace

from optin_cli.architectures.bert import BERT_SITES
from optin_cli.architectures.schema import Family, SiteTable
from optin_cli.architectures.vit import MLP, TIMM_NEURONS, VIT_HEADS
from optin_cli.structure.anatomy import (
    BY_SIZE,
    HEADS,
    NHWC,
    RATIO,
    Bypass,
    Producer,
    Ranks,
)

# what merges patches is a block as well, so that tables must say what they require
SWIN_SITES = (
    replace(
        VIT_HEADS,
        tensors={"attention.relative_position_bias.relative_position_bias_table": 1},
        requires=("attention",),
        config={},
    ),
    replace(MLP, requires=("mlp",), config={"mlp_ratio": RATIO}),
)

SWINV2_SITES = (
    replace(
        BERT_SITES[0],
        counts={
            **BERT_SITES[0].counts,
            "attention.self.continuous_position_bias_mlp.2.out_features": "units",
        },
        ranks=None,  # its logits are cosines
        tensors={
            "attention.self.logit_scale": 0,
            "attention.self.continuous_position_bias_mlp.2.weight": 0,
        },
        bypass=Bypass("attention", in_tuple=1),
        requires=("attention",),
    ),
    replace(BERT_SITES[1], requires=("intermediate",), config={"mlp_ratio": RATIO}),
)

_TIMM_SWIN_NEURONS = replace(TIMM_NEURONS[-1], requires=("mlp",))
_TIMM_SWIN_SITES = (
    SiteTable(
        HEADS,
        producers=(Producer("attn.qkv", parts=3),),
        consumer="attn.proj",
        unit_count="attn.num_heads",
        counts={"attn.num_heads": "units", "attn.scale": "scale"},
        ranks=Ranks(BY_SIZE),
        tensors={"attn.relative_position_bias_table": 1},
        bypass=Bypass("attn"),
        requires=("attn",),
    ),
    _TIMM_SWIN_NEURONS,
)

_SWIN_BLOCKS = ("encoder.layers.*.blocks.*", "encoder.layers.*.downsample")
_TIMM_SWIN_BLOCKS = ("layers.*.blocks.*", "layers.*.downsample")

SWIN = (
    Family(
        "swin",
        ("swin",),
        _SWIN_BLOCKS,
        SWIN_SITES,
        "image",
        note="position bias sliced with the heads",
        hierarchical=True,
    ),
    Family(
        "swinv2",
        ("swinv2",),
        _SWIN_BLOCKS,
        SWINV2_SITES,
        "image",
        note="position bias sliced with the heads",
        hierarchical=True,
    ),
    Family(
        "timm-swin",
        ("SwinTransformer",),
        _TIMM_SWIN_BLOCKS,
        _TIMM_SWIN_SITES,
        "image",
        note="position bias sliced with the heads",
        layout=NHWC,
        hierarchical=True,
    ),
    Family(
        "timm-swinv2",
        ("SwinTransformerV2",),
        _TIMM_SWIN_BLOCKS,
        (_TIMM_SWIN_NEURONS,),
        "image",
        note="neurons alone: attention has a fixed width",
        layout=NHWC,
        hierarchical=True,
    ),
)
