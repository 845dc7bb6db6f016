"""Text encoders: BERT and those built like it, DistilBERT, MPNet and DeBERTa with relative positions, ModernBERT
with fused projections, ALBERT with layers that share their weights."""

from __future__ import annotations

from optin_cli.architectures.schema import Family, SiteTable, linears
from optin_cli.structure.anatomy import (
    BY_SIZE,
    HEADS,
    NEURONS,
    UNITS,
    Bypass,
    Producer,
    Ranks,
    RelativePositions,
    UnitInput,
)

BERT_SITES = (
    SiteTable(
        HEADS,
        producers=linears("attention.self.query", "attention.self.key", "attention.self.value"),
        consumer="attention.output.dense",
        unit_width="attention.self.attention_head_size",
        counts={
            "attention.self.num_attention_heads": "units",
            "attention.self.all_head_size": "features",
            "attention.self.attention_head_size": "width",
        },
        ranks=Ranks(),
    ),
    SiteTable(
        NEURONS,
        producers=linears("intermediate.dense"),
        consumer="output.dense",
        config={"intermediate_size": UNITS},
    ),
)

_DISTILBERT_SITES = (
    SiteTable(
        HEADS,
        producers=linears("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        consumer="attention.out_lin",
        unit_width="attention.attention_head_size",
        counts={
            "attention.n_heads": "units",
            "attention.dim": "features",
            "attention.attention_head_size": "width",
        },
        ranks=Ranks(),
    ),
    SiteTable(NEURONS, producers=linears("ffn.lin1"), consumer="ffn.lin2", config={"hidden_dim": UNITS}),
)

_COUNTS = {"attention.self.num_attention_heads": "units", "attention.self.all_head_size": "features"}
_RELATIVE = ("attention.self.pos_dropout",)  # there are relative positions
_EMPTY = Bypass("attention.self", in_tuple=2, empty=True)  # without heads their width is unknown


def _deberta_v2_heads(*positions: str, relative: bool = True) -> SiteTable:
    """Heads with the given projections of relative positions; without any they share the keys' and queries' own."""
    return SiteTable(
        HEADS,
        producers=(
            *linears("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
            *(Producer(f"attention.self.{name}", per_batch=True) for name in positions),
        ),
        consumer="attention.output.dense",
        unit_width="attention.self.attention_head_size",
        counts=_COUNTS,
        relative=RelativePositions("attention.self.pos_att_type", "attention.self.pos_ebd_size")
        if relative
        else None,
        bypass=_EMPTY,
        requires=(*(f"attention.self.{name}" for name in positions), *_RELATIVE[:relative]),
    )


_DEBERTA_V2_SITES = (
    _deberta_v2_heads("pos_key_proj", "pos_query_proj"),
    _deberta_v2_heads("pos_key_proj"),
    _deberta_v2_heads("pos_query_proj"),
    _deberta_v2_heads(),
    _deberta_v2_heads(relative=False),
    BERT_SITES[1],
)


def _deberta_heads(*positions: str, relative: bool = True) -> SiteTable:
    """The first DeBERTa: a head's query, key and value are adjacent, and share no bias."""
    return SiteTable(
        HEADS,
        producers=(
            Producer("attention.self.in_proj", parts=3, by_unit=True),
            *(Producer(f"attention.self.{name}", per_batch=True) for name in positions),
        ),
        consumer="attention.output.dense",
        unit_width="attention.self.attention_head_size",
        counts=_COUNTS,
        tensors={"attention.self.q_bias": 0, "attention.self.v_bias": 0},
        relative=RelativePositions("attention.self.pos_att_type") if relative else None,
        bypass=_EMPTY,
        must_be_identity=("attention.self.head_logits_proj", "attention.self.head_weights_proj"),
        requires=(*(f"attention.self.{name}" for name in positions), *_RELATIVE[:relative]),
    )


_DEBERTA_SITES = (
    _deberta_heads("pos_proj", "pos_q_proj"),
    _deberta_heads("pos_proj"),
    _deberta_heads("pos_q_proj"),
    _deberta_heads(relative=False),
    BERT_SITES[1],
)

_MODERNBERT_SITES = (
    SiteTable(HEADS, (Producer("attn.Wqkv", parts=3),), "attn.Wo", unit_width="attn.head_dim"),
    SiteTable(NEURONS, (Producer("mlp.Wi", parts=2),), "mlp.Wo", config={"intermediate_size": UNITS}),
)

_MPNET_SITES = (
    SiteTable(
        HEADS,
        producers=linears("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        consumer="attention.attn.o",
        unit_width="attention.attn.attention_head_size",
        counts={
            "attention.attn.num_attention_heads": "units",
            "attention.attn.all_head_size": "features",
            "attention.attn.attention_head_size": "width",
        },
        ranks=Ranks(BY_SIZE),
        unit_inputs=(UnitInput("attention.attn", "position_bias", axis=1),),
    ),
    BERT_SITES[1],
)

_ALBERT_LAYER = "albert_layers.0"
_ALBERT_SITES = (
    SiteTable(
        HEADS,
        producers=linears(*(f"{_ALBERT_LAYER}.attention.{name}" for name in ("query", "key", "value"))),
        consumer=f"{_ALBERT_LAYER}.attention.dense",
        unit_width=f"{_ALBERT_LAYER}.attention.attention_head_size",
        counts={
            f"{_ALBERT_LAYER}.attention.num_attention_heads": "units",
            f"{_ALBERT_LAYER}.attention.all_head_size": "features",
            f"{_ALBERT_LAYER}.attention.attention_head_size": "width",
        },
        ranks=Ranks(),
    ),
    SiteTable(
        NEURONS,
        linears(f"{_ALBERT_LAYER}.ffn"),
        f"{_ALBERT_LAYER}.ffn_output",
        config={"intermediate_size": UNITS},
    ),
)

ENCODERS = (
    Family("bert", ("bert",), "encoder.layer", BERT_SITES),
    Family("roberta", ("roberta", "xlm-roberta", "camembert"), "encoder.layer", BERT_SITES),
    Family("electra", ("electra",), "encoder.layer", BERT_SITES),
    Family(
        "dpr", ("dpr",), "bert_model.encoder.layer", BERT_SITES, note="encoders of questions and contexts"
    ),
    Family("distilbert", ("distilbert",), "transformer.layer", _DISTILBERT_SITES),
    Family(
        "albert",
        ("albert",),
        "encoder.albert_layer_groups",
        _ALBERT_SITES,
        note="a unit goes from all layers that share it",
        repeats="num_hidden_layers",
    ),
    Family("deberta-v2", ("deberta-v2",), "encoder.layer", _DEBERTA_V2_SITES, note="versions 2 and 3"),
    Family("deberta", ("deberta",), "encoder.layer", _DEBERTA_SITES, note="talking heads: neurons alone"),
    Family("mpnet", ("mpnet",), "encoder.layer", _MPNET_SITES, note="position bias sliced with the heads"),
    Family("modernbert", ("modernbert",), "layers", _MODERNBERT_SITES, note="a neuron is a gate and a value"),
)
