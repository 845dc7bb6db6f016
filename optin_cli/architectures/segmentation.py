"""The tables of segmentation models: hierarchical encoders; backbones with pixel and transformer decoders."""

from __future__ import annotations

from dataclasses import replace

from optin_cli.architectures.bert import BERT_SITES
from optin_cli.architectures.cnns import TRANSFORMERS_RESNET_SITES
from optin_cli.architectures.schema import Family, SiteTable, StreamTable, linears
from optin_cli.architectures.swin import SWIN_SITES, SWINV2_SITES
from optin_cli.architectures.vit import MLP, VIT_HEADS
from optin_cli.structure.anatomy import (
    BY_SIZE,
    HEADS,
    NCHW,
    NEURONS,
    SEQUENCE,
    UNITS,
    Bypass,
    Producer,
    Ranks,
)

# keys and values see fewer positions than queries do: the last producer's output shows how many
_SEGFORMER_SITES = (
    replace(VIT_HEADS, config={}),
    replace(MLP, carried=("mlp.dwconv.dwconv",), config={}),  # mlp_ratios are whole numbers, one a stage
)

# MaskFormer has another Swin, with the names of Swin V2 and the position biases of Swin
_MASKFORMER_SWIN_SITES = (
    replace(
        BERT_SITES[0],
        tensors={"attention.self.relative_position_bias_table": 1},
        ranks=Ranks(BY_SIZE),
        bypass=Bypass("attention", in_tuple=1),
        requires=("attention.self",),
    ),
    SWINV2_SITES[1],
)

# each head samples the map at different points: 3 levels x 4 points, two offsets and one weight for each
_DEFORMABLE_HEADS = SiteTable(
    HEADS,
    producers=(
        Producer("self_attn.sampling_offsets", width=24),
        Producer("self_attn.attention_weights", width=12),
        Producer("self_attn.value_proj"),
    ),
    consumer="self_attn.output_proj",
    unit_count="self_attn.n_heads",
    counts={"self_attn.n_heads": "units", "self_attn.d_model": "features"},
    bypass=Bypass("self_attn", in_tuple=2),
    pairs=False,
    requires=("self_attn.sampling_offsets",),
)
_FFN = SiteTable(NEURONS, producers=linears("fc1"), consumer="fc2", requires=("fc1",))

_DETR_HEADS = SiteTable(
    HEADS,
    producers=linears("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    consumer="self_attn.o_proj",
    unit_width="self_attn.head_dim",
    requires=("self_attn.o_proj",),
)
_DETR_CROSS_HEADS = SiteTable(
    HEADS,
    name="cross_heads",
    producers=linears("encoder_attn.q_proj", "encoder_attn.k_proj", "encoder_attn.v_proj"),
    consumer="encoder_attn.o_proj",
    unit_width="encoder_attn.head_dim",
    requires=("encoder_attn.o_proj",),
)

_BACKBONE = "pixel_level_module.encoder"
_RESNET = StreamTable((f"{_BACKBONE}.encoder.stages.*.layers.*",), NCHW)


def _swin(base: str) -> StreamTable:
    layers = f"{_BACKBONE}.{base}.encoder.layers.*"
    return StreamTable((f"{layers}.blocks.*", f"{layers}.downsample"), config="backbone_config.")


SEGMENTATION = (
    Family(
        "segformer",
        ("segformer",),
        "",
        _SEGFORMER_SITES,
        "image",
        note="neurons go with their depthwise convolution",
        streams=(StreamTable(("stages.*.blocks.*",)),),
        hierarchical=True,
        chained=False,
    ),
    Family(
        "mask2former",
        ("mask2former",),
        "",
        (
            *SWIN_SITES,
            *TRANSFORMERS_RESNET_SITES,
            _DEFORMABLE_HEADS,
            # the decoder's is (queries, batch, features)
            replace(_FFN, batch_axis=1, requires=("fc1", "cross_attn"), config={"dim_feedforward": UNITS}),
            replace(_FFN, config={"encoder_feedforward_dim": UNITS}),
        ),
        "image",
        note="Swin or ResNet, pixel decoder; of the transformer decoder the neurons alone",
        streams=(
            _swin("swin"),
            _RESNET,
            StreamTable("pixel_level_module.decoder.encoder.layers"),
            StreamTable("transformer_module.decoder.layers", SEQUENCE),
        ),
        hierarchical=True,
        thresholds=True,
    ),
    Family(
        "maskformer",
        ("maskformer",),
        "",
        (
            *_MASKFORMER_SWIN_SITES,
            *TRANSFORMERS_RESNET_SITES,
            _DETR_HEADS,
            _DETR_CROSS_HEADS,
            replace(MLP, requires=("mlp",), config={"decoder_config.decoder_ffn_dim": UNITS}),
        ),
        "image",
        note="Swin or ResNet, transformer decoder; the convolutions of the pixel decoder stay",
        streams=(_swin("model"), _RESNET, StreamTable("transformer_module.decoder.layers")),
        hierarchical=True,
    ),
)
