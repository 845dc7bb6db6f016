"""The families that ship with optin: one table of module paths each, and nothing else. docs/anatomy.md explains."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from optin_cli.models.anatomy import (
    ATTENTION_MASK,
    HEADS,
    NEURONS,
    TOKENS,
    Bypass,
    Producer,
    RelativePositions,
    UnitInput,
)


@dataclass(frozen=True)
class SiteTable:
    """Where a site stands inside a block. All paths are relative to the block."""

    kind: str
    """`heads`, `neurons` or `channels`."""
    producers: tuple[Producer, ...] = ()
    """The Linears or Conv2ds whose outputs are the units. None in a chain without residuals: then it is the layer
    that runs before the consumer, in this block or an earlier one."""
    consumer: str = ""
    """The Linear or Conv2d whose inputs are the units; the block itself by default."""
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
    group: str = ""
    """The attribute that holds how many heads share keys and values: then a unit is a group of so many, each as wide
    as `unit_width` says."""
    unit_count: str = ""
    """The attribute that holds the number of units, in place of `unit_width` where none holds their width."""
    counts: dict[str, str] = field(default_factory=dict)
    """Attributes to rewrite after slicing: path -> 'units' (a count) or 'features' (units * width)."""
    unit_inputs: tuple[UnitInput, ...] = ()
    """Forward arguments with one slice a unit, computed outside the block."""
    tensors: dict[str, int] = field(default_factory=dict)
    """Parameters and buffers with one slice a unit, or one a feature of it: path -> axis (the biases of each head's
    relative positions)."""
    relative: RelativePositions | None = None
    bypass: Bypass | None = None
    """A module that can't run without units, for when all are gone."""
    pairs: bool = True
    """Of heads: each position attends to every other, or to those of its window. Not in deformable attention."""
    batch_axis: int = 0
    """Where the examples stand in what is masked: 1 in (tokens, batch, features)."""
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
class TokenTable:
    """What merging tokens needs to know of a family. Its blocks must care for no position but by its content."""

    keys: str
    """One of the producers of the heads, relative to the block: what gives the keys."""
    attention: str
    """The attention module, relative to the block."""
    bias: str
    """Its argument that is added to the logits of the keys."""
    prefix: tuple[str, ...] = ()
    """Attributes, relative to the base model, of tokens in front that are never merged: a number of them, or a
    parameter whose rows they are. A model need not have all of them."""
    part: int = 0
    """Which part of a fused projection holds the keys, counted from 0."""


@dataclass(frozen=True)
class StreamTable:
    """One of several lists of blocks."""

    blocks: str | tuple[str, ...]
    """As `Family.blocks`. A model need not have any, as long as another stream has some."""
    layout: str = TOKENS
    mask: str = ATTENTION_MASK
    """The input of the model that tells which tokens are no padding."""

    @property
    def patterns(self) -> tuple[str, ...]:
        """What paths of blocks look like: those that a list of blocks holds, where its path is given."""
        if not isinstance(self.blocks, str):
            return self.blocks
        return (self.blocks if "*" in self.blocks else f"{self.blocks}.*",)


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
    """`text`, `image` or `audio`: which kind of data the model reads."""
    note: str = ""
    layout: str = TOKENS
    """How a block's hidden states lie: `tokens` (batch, tokens, d), `nhwc` or `nchw`."""
    hierarchical: bool = False
    """Blocks see different numbers of positions, or attend within windows: costs are counted by a forward."""
    tokens: TokenTable | None = None
    """How tokens are merged; None where they can't be."""
    repeats: str = ""
    """The attribute of the config with the number of blocks, where fewer modules share them: each runs as many times,
    one after the other (ALBERT)."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments of the model beside its data: a decoder that is not generating fills no cache."""
    streams: tuple[StreamTable, ...] = ()
    """In place of `blocks` and `layout`, where there are several lists of blocks: an encoder's and a decoder's. In
    order of depth: what a block computes changes nothing in those before."""
    thresholds: bool = False
    """Something inside is cut off at a threshold (a mask that attention is confined to): the sliced and the masked
    model are then compared in float64, where rounding puts nothing on the other side."""
    chained: bool = True
    """False where blocks need more than the hidden states of the one before. Several streams are never chained."""

    @property
    def all_streams(self) -> tuple[StreamTable, ...]:
        """Its lists of blocks: one, unless `streams` has more."""
        return self.streams or (StreamTable(self.blocks, self.layout),)


def linears(*paths: str) -> tuple[Producer, ...]:
    return tuple(Producer(path) for path in paths)


BERT_SITES = (
    SiteTable(
        HEADS,
        producers=linears("attention.self.query", "attention.self.key", "attention.self.value"),
        consumer="attention.output.dense",
        unit_width="attention.self.attention_head_size",
        counts={"attention.self.num_attention_heads": "units", "attention.self.all_head_size": "features"},
    ),
    SiteTable(NEURONS, producers=linears("intermediate.dense"), consumer="output.dense"),
)

_DISTILBERT_SITES = (
    SiteTable(
        HEADS,
        producers=linears("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        consumer="attention.out_lin",
        unit_width="attention.attention_head_size",
        counts={"attention.n_heads": "units", "attention.dim": "features"},
    ),
    SiteTable(NEURONS, producers=linears("ffn.lin1"), consumer="ffn.lin2"),
)

VIT_HEADS = SiteTable(
    HEADS,
    producers=linears("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    consumer="attention.o_proj",
    unit_width="attention.head_dim",
    counts={"attention.num_attention_heads": "units"},
)
MLP = SiteTable(NEURONS, producers=linears("mlp.fc1"), consumer="mlp.fc2")

# relative position biases, of the block or shared by all, reach the attention as its mask: (1, heads, s, s)
_BEIT_SITES = (
    replace(VIT_HEADS, unit_inputs=(UnitInput("attention", "attention_mask", axis=1),)),
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
    MLP,
)

_CLIP_SITES = (
    SiteTable(
        HEADS,
        producers=linears("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        consumer="self_attn.out_proj",
        unit_width="self_attn.head_dim",
        counts={"self_attn.num_heads": "units"},
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

SHIPPED = (
    Family("bert", ("bert",), "encoder.layer", BERT_SITES),
    Family("roberta", ("roberta", "xlm-roberta", "camembert"), "encoder.layer", BERT_SITES),
    Family("electra", ("electra",), "encoder.layer", BERT_SITES),
    Family("distilbert", ("distilbert",), "transformer.layer", _DISTILBERT_SITES),
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
        _CLIP_SITES,
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
"""Models of two towers, each with blocks of its own -> the classes that open one of them."""
