"""Vision transformers of transformers and timm, and the towers of CLIP."""

from __future__ import annotations

from dataclasses import replace

from optin_cli.architectures.schema import Family, SiteTable, TokenTable, linears
from optin_cli.structure.anatomy import (
    ALL_HEADS,
    BY_SIZE,
    HEAD_WIDTH,
    HEADS,
    NEURONS,
    RATIO,
    UNITS,
    Producer,
    Ranks,
    UnitInput,
)

VIT_HEADS = SiteTable(
    HEADS,
    producers=linears("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    consumer="attention.o_proj",
    unit_width="attention.head_dim",
    counts={
        "attention.num_attention_heads": "units",
        "attention.head_dim": "width",
        "attention.scaling": "scale",
    },
    ranks=Ranks(BY_SIZE),
    config={"num_attention_heads": ALL_HEADS, "head_dim": HEAD_WIDTH},
)
MLP = SiteTable(
    NEURONS, producers=linears("mlp.fc1"), consumer="mlp.fc2", config={"intermediate_size": UNITS}
)

# relative position biases, of the block or shared by all, reach the attention as its mask: (1, heads, s, s)
_BEIT_SITES = (
    replace(
        VIT_HEADS,
        unit_inputs=(
            UnitInput(
                "attention",
                "attention_mask",
                axis=1,
                table="relative_position_bias.relative_position_bias_table",
            ),
        ),
        requires=("relative_position_bias",),
    ),
    replace(VIT_HEADS, unit_inputs=(UnitInput("attention", "attention_mask", axis=1),), config={}),
    MLP,
)

_DINOV2_SITES = (
    VIT_HEADS,
    SiteTable(
        NEURONS,
        producers=linears("mlp.gate_proj", "mlp.up_proj"),
        consumer="mlp.down_proj",
        requires=("mlp.gate_proj",),
    ),
    replace(MLP, config={}),  # mlp_ratio is a whole number
)

_CLIP_SITES = (
    SiteTable(
        HEADS,
        producers=linears("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        consumer="self_attn.out_proj",
        unit_width="self_attn.head_dim",
        counts={"self_attn.num_heads": "units", "self_attn.head_dim": "width"},
        ranks=Ranks(),
    ),
    MLP,
)

TIMM_NEURONS = (
    SiteTable(  # GluMlp (SwiGLUPacked): fc1 holds gate and value, in either order
        NEURONS,
        producers=(Producer("mlp.fc1", parts=2),),
        consumer="mlp.fc2",
        must_be_identity=("mlp.norm",),
        requires=("mlp.gate_last",),
    ),
    SiteTable(
        NEURONS,
        producers=linears("mlp.fc1_g", "mlp.fc1_x"),
        consumer="mlp.fc2",
        must_be_identity=("mlp.norm",),
        requires=("mlp.fc1_g",),
    ),
    SiteTable(
        NEURONS,
        producers=linears("mlp.fc1"),
        consumer="mlp.fc2",
        config={"mlp_ratio": RATIO},
        must_be_identity=("mlp.norm", "mlp.grn", "mlp.gate"),
    ),
)

_TIMM_VIT_SITES = (
    SiteTable(
        HEADS,
        producers=(Producer("attn.qkv", parts=3),),
        consumer="attn.proj",
        unit_width="attn.head_dim",
        counts={
            "attn.num_heads": "units",
            "attn.attn_dim": "features",
            "attn.head_dim": "width",
            "attn.scale": "scale",
        },
        ranks=Ranks(BY_SIZE, must_be_identity=("attn.q_norm", "attn.k_norm")),
        must_be_identity=("attn.norm", "attn.gate"),
    ),
    *TIMM_NEURONS,
)

# timm's EvaAttention gives its context the width of its input, whatever its heads: it has no `attn_dim`, and its
# heads can't be removed. AttentionRope has one.
_TIMM_EVA_HEADS = SiteTable(
    HEADS,
    producers=(Producer("attn.qkv", parts=3),),
    consumer="attn.proj",
    unit_width="attn.head_dim",
    counts={
        "attn.num_heads": "units",
        "attn.num_kv_heads": "units",
        "attn.attn_dim": "features",
        "attn.kv_dim": "features",
    },
    unit_inputs=(UnitInput("attn", "rope", axis=-3),),  # rope_type 'mixed': (heads, s, 2 * width)
    must_be_identity=("attn.norm", "attn.gate"),
    requires=("attn.attn_dim", "attn.qkv"),
)
_TIMM_EVA_SITES = (
    _TIMM_EVA_HEADS,
    replace(
        _TIMM_EVA_HEADS,
        producers=linears("attn.q_proj", "attn.k_proj", "attn.v_proj"),
        requires=("attn.attn_dim", "attn.q_proj"),
    ),
    *TIMM_NEURONS,
)

_VIT_TOKENS = TokenTable(
    keys="attention.k_proj",
    attention="attention",
    bias="attention_mask",
    prefix=("embeddings.cls_token", "embeddings.distillation_token", "embeddings.register_tokens"),
)
_CLIP_TOKENS = TokenTable("self_attn.k_proj", "self_attn", "attention_mask", ("embeddings.class_embedding",))
_TIMM_VIT_TOKENS = TokenTable("attn.qkv", "attn", "attn_mask", ("num_prefix_tokens",), part=1)

VITS = (
    Family("clip-text", ("clip_text_model",), "encoder.layers", _CLIP_SITES, note="a tower of CLIP"),
    Family("vit", ("vit", "deit"), "layers", (VIT_HEADS, MLP), "image", tokens=_VIT_TOKENS),
    Family("beit", ("beit",), "layers", _BEIT_SITES, "image", note="position bias sliced with the heads"),
    Family(
        "dinov2",
        ("dinov2", "dinov2_with_registers"),
        "encoder.layer",
        _DINOV2_SITES,
        "image",
        note="SwiGLU: a neuron is a gate and a value",
        tokens=_VIT_TOKENS,
    ),
    Family(
        "clip-vision",
        ("clip_vision_model",),
        "encoder.layers",
        _CLIP_SITES,
        "image",
        "a tower of CLIP",
        tokens=_CLIP_TOKENS,
    ),
    Family(
        "clip-image-classifier",
        ("CLIPForImageClassification",),
        "vision_model.encoder.layers",
        (_CLIP_SITES[0], replace(MLP, config={"vision_config.intermediate_size": UNITS})),
        "image",
        tokens=replace(_CLIP_TOKENS, prefix=("vision_model.embeddings.class_embedding",)),
    ),
    Family(
        "timm-vit",
        ("VisionTransformer", "VisionTransformerDistilled"),
        "blocks",
        _TIMM_VIT_SITES,
        "image",
        note="fused qkv",
        tokens=_TIMM_VIT_TOKENS,
    ),
    Family(
        "timm-eva",
        ("Eva",),
        "blocks",
        _TIMM_EVA_SITES,
        "image",
        note="heads with attn_type='rope' alone: EvaAttention has a fixed width",
    ),
    Family(
        "timm-beit",
        ("Beit",),
        "blocks",
        TIMM_NEURONS,
        "image",
        note="neurons alone: attention has a fixed width",
    ),
)

TOWERS = {"CLIPModel": ("CLIPVisionModelWithProjection", "CLIPTextModelWithProjection")}
"""Models of two towers with separate blocks -> the classes that open one of them."""
