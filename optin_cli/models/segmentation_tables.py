"""The tables of segmentation models: hierarchical encoders, backbones with pixel and transformer decoders."""

from __future__ import annotations

from dataclasses import replace

from optin_cli.models.tables import MLP, VIT_HEADS, Family, linears

# keys and values see fewer positions than queries, so that the last producer tells how many there are
_SEGFORMER_SITES = (
    replace(
        VIT_HEADS,
        producers=linears("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        requires=("attention",),
    ),
    replace(MLP, carried=("mlp.dwconv.dwconv",)),
)

SEGMENTATION = (
    Family(
        "segformer",
        ("segformer",),
        ("stages.*.blocks.*",),
        _SEGFORMER_SITES,
        "image",
        note="neurons go with their depthwise convolution",
        hierarchical=True,
    ),
)
