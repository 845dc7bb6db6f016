"""The tables of decoders and encoder-decoders: a cache of keys and values follows what is left of each block."""

from __future__ import annotations

from dataclasses import replace

from optin_cli.architectures.bert import BERT_SITES
from optin_cli.architectures.schema import Family, SiteTable, StreamTable, linears
from optin_cli.architectures.vit import MLP
from optin_cli.structure.anatomy import (
    ALL_HEADS,
    HEAD_WIDTH,
    HEADS,
    NEURONS,
    UNITS,
    Bypass,
    Producer,
    Ranks,
    UnitInput,
)

_NO_CACHE = {"use_cache": False}

_GPT2_SITES = (
    SiteTable(
        HEADS,
        producers=(Producer("attn.c_attn", parts=3),),
        consumer="attn.c_proj",
        unit_width="attn.head_dim",
        counts={"attn.num_heads": "units", "attn.split_size": "features", "attn.head_dim": "width"},
        ranks=Ranks(),
        bypass=Bypass("attn", in_tuple=2, cache="past_key_values"),
    ),
    SiteTable(NEURONS, producers=linears("mlp.c_fc"), consumer="mlp.c_proj", config={"n_inner": UNITS}),
)

# a unit is a head of keys and values with all the heads of queries that read it; of a single one, a head of queries
_LLAMA_HEADS = SiteTable(
    HEADS,
    producers=(
        Producer("self_attn.q_proj"),
        Producer("self_attn.k_proj", shared=True),
        Producer("self_attn.v_proj", shared=True),
    ),
    consumer="self_attn.o_proj",
    unit_width="self_attn.head_dim",
    group="self_attn.num_key_value_groups",
    query_heads=True,
    config={"num_attention_heads": ALL_HEADS, "num_key_value_heads": UNITS, "head_dim": HEAD_WIDTH},
    bypass=Bypass("self_attn", in_tuple=2, cache="past_key_values"),
)
_LLAMA_SITES = (
    _LLAMA_HEADS,
    SiteTable(
        NEURONS,
        producers=linears("mlp.gate_proj", "mlp.up_proj"),
        consumer="mlp.down_proj",
        config={"intermediate_size": UNITS},
    ),
)

_OPT_SITES = (
    SiteTable(
        HEADS,
        producers=linears("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        consumer="self_attn.out_proj",
        unit_width="self_attn.head_dim",
        counts={"self_attn.num_heads": "units", "self_attn.head_dim": "width"},
        ranks=Ranks(),
        bypass=Bypass("self_attn", in_tuple=2, cache="past_key_values"),
    ),
    SiteTable(NEURONS, producers=linears("fc1"), consumer="fc2", config={"ffn_dim": UNITS}),
)

_GPT_NEOX_SITES = (
    SiteTable(
        HEADS,
        producers=(Producer("attention.query_key_value", parts=3, by_unit=True),),
        consumer="attention.dense",
        unit_width="attention.head_size",
        bypass=Bypass("attention", in_tuple=2, cache="layer_past"),
    ),
    SiteTable(
        NEURONS,
        producers=linears("mlp.dense_h_to_4h"),
        consumer="mlp.dense_4h_to_h",
        config={"intermediate_size": UNITS},
    ),
)

_PHI_SITES = (replace(_LLAMA_HEADS, consumer="self_attn.dense"), MLP)

_GATED = SiteTable(
    NEURONS,
    producers=linears("layer.1.DenseReluDense.wi_0", "layer.1.DenseReluDense.wi_1"),
    consumer="layer.1.DenseReluDense.wo",
    requires=("layer.1.DenseReluDense.wi_0",),
    config={"d_ff": UNITS},
)
_PLAIN = replace(
    _GATED, producers=linears("layer.1.DenseReluDense.wi"), requires=("layer.1.DenseReluDense.wi",)
)
# the first block makes the biases of all blocks' relative positions; cross-attention has none
_T5_SELF, _T5_CROSS = (
    SiteTable(
        HEADS,
        name=name,
        producers=linears(f"{module}.q", f"{module}.k", f"{module}.v"),
        consumer=f"{module}.o",
        unit_width=f"{module}.key_value_proj_dim",
        counts={
            f"{module}.n_heads": "units",
            f"{module}.inner_dim": "features",
            f"{module}.key_value_proj_dim": "width",
        },
        ranks=Ranks(),
        config={"num_heads": ALL_HEADS, "d_kv": HEAD_WIDTH},
        unit_inputs=(
            UnitInput(
                module,
                "position_bias",
                axis=1,
                returned=1,
                maker=maker,
                needs="has_relative_attention_bias",
                table=f"{module}.relative_attention_bias.weight",
            ),
        ),
        bypass=Bypass(module, in_tuple=3, cache=cache),
        requires=(module,),
    )
    for module, name, maker, cache in (
        ("layer.0.SelfAttention", "", "compute_bias", "past_key_values"),
        ("layer.1.EncDecAttention", "cross", "", ""),
    )
)
_T5_SITES = (
    _T5_SELF,
    _T5_CROSS,
    _GATED,
    _PLAIN,
    *(
        replace(
            table,
            producers=tuple(Producer(p.path.replace("layer.1", "layer.2")) for p in table.producers),
            consumer=table.consumer.replace("layer.1", "layer.2"),
            requires=tuple(path.replace("layer.1", "layer.2") for path in table.requires),
        )
        for table in (_GATED, _PLAIN)
    ),
)

# a decoder's block attends to itself and to the encoder's output; of Whisper the keys have no bias
BART_SITES = (
    *(
        SiteTable(
            HEADS,
            name=name,
            producers=linears(f"{module}.q_proj", f"{module}.k_proj", f"{module}.v_proj"),
            consumer=f"{module}.out_proj",
            unit_width=f"{module}.head_dim",
            counts={f"{module}.num_heads": "units", f"{module}.head_dim": "width"},
            ranks=Ranks(),
            bypass=Bypass(module, in_tuple=2, cache="past_key_values", attended=attended),
            requires=(module,),
        )
        for module, name, attended in (("self_attn", "", ""), ("encoder_attn", "cross", "key_value_states"))
    ),
    SiteTable(NEURONS, producers=linears("fc1"), consumer="fc2", config={"ffn_dim": UNITS}),
)
BART_STREAMS = (
    StreamTable("encoder.layers", config="encoder_"),
    StreamTable("decoder.layers", mask="decoder_attention_mask", config="decoder_"),
)

# BERT as encoder and as decoder, which has a cache
_BERT_HEADS = BERT_SITES[0]
_BERT_TO_BERT_SITES = (
    replace(_BERT_HEADS, bypass=Bypass("attention.self", in_tuple=2, cache="past_key_values", empty=True)),
    replace(
        _BERT_HEADS,
        name="cross",
        producers=linears(*(f"crossattention.self.{name}" for name in ("query", "key", "value"))),
        consumer="crossattention.output.dense",
        unit_width="crossattention.self.attention_head_size",
        counts={
            "crossattention.self.num_attention_heads": "units",
            "crossattention.self.all_head_size": "features",
            "crossattention.self.attention_head_size": "width",
        },
        bypass=Bypass(
            "crossattention.self",
            in_tuple=2,
            cache="past_key_values",
            attended="encoder_hidden_states",
            empty=True,
        ),
        requires=("crossattention",),
    ),
    BERT_SITES[1],
)

_TWO_STREAMS = "MACs are counted for a decoder that reads as many tokens as its encoder"

DECODERS = (
    Family("gpt2", ("gpt2",), "h", _GPT2_SITES, arguments=_NO_CACHE),
    Family(
        "llama",
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
        "layers",
        _LLAMA_SITES,
        note="a unit of heads is a head of keys and values with the query heads that share it; of a single one it is a "
        "query head",
        arguments=_NO_CACHE,
    ),
    Family("opt", ("opt",), "decoder.layers", _OPT_SITES, arguments=_NO_CACHE),
    Family("gpt-neox", ("gpt_neox",), "layers", _GPT_NEOX_SITES, arguments=_NO_CACHE),
    Family("phi", ("phi",), "layers", _PHI_SITES, arguments=_NO_CACHE),
    Family(
        "t5",
        ("t5", "mt5"),
        "",
        _T5_SITES,
        streams=(StreamTable("encoder.block"), StreamTable("decoder.block", mask="decoder_attention_mask")),
        arguments=_NO_CACHE,
        chained=False,  # nor is an encoder alone: its first block makes what the others read
        note=_TWO_STREAMS,
    ),
    Family(
        "bart",
        ("bart", "mbart", "marian", "m2m_100", "pegasus", "plbart", "blenderbot", "blenderbot-small"),
        "",
        BART_SITES,
        streams=BART_STREAMS,
        arguments=_NO_CACHE,
        note=f"and NLLB, which is m2m_100; {_TWO_STREAMS}",
    ),
    Family(
        "encoder-decoder",
        ("encoder-decoder",),
        "",
        _BERT_TO_BERT_SITES,
        streams=(
            StreamTable("encoder.encoder.layer", config="encoder."),
            StreamTable(("decoder.*.encoder.layer.*",), mask="decoder_attention_mask", config="decoder."),
        ),
        arguments=_NO_CACHE,
        note=f"of BERTs and RoBERTas (bert2bert); {_TWO_STREAMS}",
    ),
)
