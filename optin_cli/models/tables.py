"""The families that ship with optin: one table of module paths each, and nothing else. docs/families.md explains."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from optin_cli.models.anatomy import CHANNELS, HEADS, NCHW, NEURONS, TOKENS, Producer, UnitInput


@dataclass(frozen=True)
class SiteTable:
    """Where a site stands inside a block. All paths are relative to the block."""

    kind: str
    """`heads`, `neurons` or `channels`."""
    producers: tuple[Producer, ...]
    """The Linears or Conv2ds whose outputs are the units."""
    consumer: str
    """The Linear or Conv2d whose inputs are the units."""
    name: str = ""
    """What the site is called within its block, where a block has several of one kind; by default the kind."""
    carried: tuple[str, ...] = ()
    """Modules between producers and consumer that hold something for each unit: norms, depthwise convolutions."""
    readers: tuple[str, ...] = ()
    """Modules beside the consumer whose inputs are the units: a squeeze-and-excite's reduction."""
    masked_at: str = ""
    """The module that first reads the units, where that is not the consumer: a squeeze-and-excite."""
    norm: str = ""
    """The BatchNorm right behind the consumer: its bias takes up what a consumer without one can't."""
    unit_width: str | int = 1
    """Features of one unit: a number, or the attribute that holds it (`attn.head_dim`)."""
    counts: dict[str, str] = field(default_factory=dict)
    """Attributes to rewrite after slicing: path -> 'units' (a count) or 'features' (units * width)."""
    unit_inputs: tuple[UnitInput, ...] = ()
    """Forward arguments with one slice a unit, computed outside the block."""
    must_be_identity: tuple[str, ...] = ()
    """Modules that mix units when present (a norm over all heads): the site is left out if one is there."""
    requires: tuple[str, ...] = ()
    """Modules or attributes that a block must have for this table to fit it. Of several tables of one name, a block
    takes the first that fits; where none does, that site is left out."""

    @property
    def label(self) -> str:
        """What the site is called within its block."""
        return self.name or self.kind


@dataclass(frozen=True)
class Family:
    """One architecture: which models it fits, where the blocks are, and the sites of a block."""

    name: str
    matches: tuple[str, ...]
    """`config.model_type` of transformers models, or the class name of any other module."""
    blocks: str | tuple[str, ...]
    """Path of the list of blocks, from the base model (without the task head); or patterns (`*` stands for any part
    of a name), which all blocks match. The blocks run in the order in which their modules are registered, and each
    receives what the one before gives. None and Identity are no blocks."""
    sites: tuple[SiteTable, ...]
    modality: str = "text"
    """`text` or `image`: which kind of data the model reads."""
    note: str = ""
    layout: str = TOKENS
    """How a block's hidden states lie: `tokens` (batch, tokens, d), `nhwc` or `nchw`."""
    hierarchical: bool = False
    """Blocks see different numbers of positions, or attend within windows: costs are counted by a forward."""


def _linears(*paths: str) -> tuple[Producer, ...]:
    return tuple(Producer(path) for path in paths)


_BERT_SITES = (
    SiteTable(
        HEADS,
        producers=_linears("attention.self.query", "attention.self.key", "attention.self.value"),
        consumer="attention.output.dense",
        unit_width="attention.self.attention_head_size",
        counts={"attention.self.num_attention_heads": "units", "attention.self.all_head_size": "features"},
    ),
    SiteTable(NEURONS, producers=_linears("intermediate.dense"), consumer="output.dense"),
)

_DISTILBERT_SITES = (
    SiteTable(
        HEADS,
        producers=_linears("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        consumer="attention.out_lin",
        unit_width="attention.attention_head_size",
        counts={"attention.n_heads": "units", "attention.dim": "features"},
    ),
    SiteTable(NEURONS, producers=_linears("ffn.lin1"), consumer="ffn.lin2"),
)

_MPNET_SITES = (
    SiteTable(
        HEADS,
        producers=_linears("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        consumer="attention.attn.o",
        unit_width="attention.attn.attention_head_size",
        counts={"attention.attn.num_attention_heads": "units", "attention.attn.all_head_size": "features"},
        unit_inputs=(UnitInput("attention.attn", "position_bias", axis=1),),
    ),
    _BERT_SITES[1],
)

_VIT_HEADS = SiteTable(
    HEADS,
    producers=_linears("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    consumer="attention.o_proj",
    unit_width="attention.head_dim",
    counts={"attention.num_attention_heads": "units"},
)
_MLP = SiteTable(NEURONS, producers=_linears("mlp.fc1"), consumer="mlp.fc2")

# relative position biases, of the block or shared by all, reach the attention as its mask: (1, heads, s, s)
_BEIT_SITES = (
    replace(_VIT_HEADS, unit_inputs=(UnitInput("attention", "attention_mask", axis=1),)),
    _MLP,
)

_DINOV2_SITES = (
    _VIT_HEADS,
    SiteTable(
        NEURONS,
        producers=_linears("mlp.gate_proj", "mlp.up_proj"),
        consumer="mlp.down_proj",
        requires=("mlp.gate_proj",),
    ),
    _MLP,
)

_CLIP_SITES = (
    SiteTable(
        HEADS,
        producers=_linears("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        consumer="self_attn.out_proj",
        unit_width="self_attn.head_dim",
        counts={"self_attn.num_heads": "units"},
    ),
    _MLP,
)

_TIMM_NEURONS = (
    SiteTable(  # GluMlp (SwiGLUPacked): fc1 holds gate and value, in either order
        NEURONS,
        producers=(Producer("mlp.fc1", parts=2),),
        consumer="mlp.fc2",
        must_be_identity=("mlp.norm",),
        requires=("mlp.gate_last",),
    ),
    SiteTable(
        NEURONS,
        producers=_linears("mlp.fc1_g", "mlp.fc1_x"),
        consumer="mlp.fc2",
        must_be_identity=("mlp.norm",),
        requires=("mlp.fc1_g",),
    ),
    SiteTable(
        NEURONS,
        producers=_linears("mlp.fc1"),
        consumer="mlp.fc2",
        must_be_identity=("mlp.norm", "mlp.grn", "mlp.gate"),
    ),
)

_TIMM_VIT_SITES = (
    SiteTable(
        HEADS,
        producers=(Producer("attn.qkv", parts=3),),
        consumer="attn.proj",
        unit_width="attn.head_dim",
        counts={"attn.num_heads": "units", "attn.attn_dim": "features"},
        must_be_identity=("attn.norm", "attn.gate"),
    ),
    *_TIMM_NEURONS,
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
        producers=_linears("attn.q_proj", "attn.k_proj", "attn.v_proj"),
        requires=("attn.attn_dim", "attn.q_proj"),
    ),
    *_TIMM_NEURONS,
)

_BASIC_BLOCK = SiteTable(
    CHANNELS,
    producers=_linears("conv1"),
    carried=("bn1",),
    consumer="conv2",
    norm="bn2",
    must_be_identity=("aa", "conv3"),
)
_BOTTLENECK = (
    SiteTable(
        CHANNELS,
        name="channels1",
        producers=_linears("conv1"),
        carried=("bn1",),
        consumer="conv2",
        norm="bn2",
        requires=("conv3",),
    ),
    SiteTable(
        CHANNELS,
        name="channels2",
        producers=_linears("conv2"),
        carried=("bn2",),
        consumer="conv3",
        norm="bn3",
        must_be_identity=("aa",),
        requires=("conv3",),
    ),
)
_RESNET_SITES = (_BASIC_BLOCK, *_BOTTLENECK)

_INVERTED_RESIDUAL = SiteTable(
    CHANNELS,
    producers=_linears("conv_pw"),
    carried=("bn1", "conv_dw", "bn2"),
    consumer="conv_pwl",
    norm="bn3",
    must_be_identity=("aa", "se"),
    requires=("conv_pw", "conv_pwl"),
)
_FUSED_INVERTED_RESIDUAL = SiteTable(
    CHANNELS,
    producers=_linears("conv_exp"),
    carried=("bn1",),
    consumer="conv_pwl",
    norm="bn2",
    must_be_identity=("aa", "se"),
    requires=("conv_exp",),
)
_EFFICIENTNET_SITES = (
    *(
        replace(
            table,
            producers=(*table.producers, Producer("se.conv_expand")),
            readers=("se.conv_reduce",),
            masked_at="se",
            must_be_identity=("aa",),
            requires=(*table.requires, "se.conv_reduce"),
        )
        for table in (_INVERTED_RESIDUAL, _FUSED_INVERTED_RESIDUAL)
    ),
    _INVERTED_RESIDUAL,
    _FUSED_INVERTED_RESIDUAL,
)

SHIPPED = (
    Family("bert", ("bert",), "encoder.layer", _BERT_SITES),
    Family("roberta", ("roberta", "xlm-roberta", "camembert"), "encoder.layer", _BERT_SITES),
    Family("electra", ("electra",), "encoder.layer", _BERT_SITES),
    Family("distilbert", ("distilbert",), "transformer.layer", _DISTILBERT_SITES),
    Family("mpnet", ("mpnet",), "encoder.layer", _MPNET_SITES, note="position bias sliced with the heads"),
    Family("clip-text", ("clip_text_model",), "encoder.layers", _CLIP_SITES, note="a tower of CLIP"),
    Family("vit", ("vit", "deit"), "layers", (_VIT_HEADS, _MLP), "image"),
    Family("beit", ("beit",), "layers", _BEIT_SITES, "image", note="position bias sliced with the heads"),
    Family(
        "dinov2",
        ("dinov2", "dinov2_with_registers"),
        "encoder.layer",
        _DINOV2_SITES,
        "image",
        note="SwiGLU: a neuron is a gate and a value",
    ),
    Family("clip-vision", ("clip_vision_model",), "encoder.layers", _CLIP_SITES, "image", "a tower of CLIP"),
    Family(
        "clip-image-classifier",
        ("CLIPForImageClassification",),
        "vision_model.encoder.layers",
        _CLIP_SITES,
        "image",
    ),
    Family(
        "timm-vit",
        ("VisionTransformer", "VisionTransformerDistilled"),
        "blocks",
        _TIMM_VIT_SITES,
        "image",
        note="fused qkv",
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
        _TIMM_NEURONS,
        "image",
        note="neurons alone: attention has a fixed width",
    ),
    Family(
        "resnet",
        ("ResNet",),
        ("layer?.*",),
        _RESNET_SITES,
        "image",
        note="of timm and torchvision; grouped convolutions are left alone",
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
        (replace(_TIMM_NEURONS[-1], requires=("mlp.fc1",)),),
        "image",
        note="not V2, whose norm mixes neurons",
        layout=NCHW,
        hierarchical=True,
    ),
    Family(
        "convnext",
        ("convnext",),
        ("encoder.stages.*.downsampling_layer.*", "encoder.stages.*.layers.*"),
        (SiteTable(NEURONS, producers=_linears("pwconv1"), consumer="pwconv2", requires=("pwconv1",)),),
        "image",
        layout=NCHW,
        hierarchical=True,
    ),
)

TOWERS = {"CLIPModel": ("CLIPVisionModelWithProjection", "CLIPTextModelWithProjection")}
"""Models of two towers, each with blocks of its own -> the classes that open one of them."""
