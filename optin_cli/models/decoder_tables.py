"""The tables of decoders: attention that looks back only, and fills a cache of keys and values when it generates."""

from __future__ import annotations

from dataclasses import replace

from optin_cli.models.anatomy import HEADS, NEURONS, Bypass, Producer
from optin_cli.models.tables import MLP, Family, SiteTable, linears

_NO_CACHE = {"use_cache": False}

_GPT2_SITES = (
    SiteTable(
        HEADS,
        producers=(Producer("attn.c_attn", parts=3),),
        consumer="attn.c_proj",
        unit_width="attn.head_dim",
        counts={"attn.num_heads": "units", "attn.split_size": "features"},
        bypass=Bypass("attn", in_tuple=2, cache="past_key_values"),
    ),
    SiteTable(NEURONS, producers=linears("mlp.c_fc"), consumer="mlp.c_proj"),
)

# a unit is a head of keys and values with all the heads of queries that read it
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
    bypass=Bypass("self_attn", in_tuple=2, cache="past_key_values"),
)
_LLAMA_SITES = (
    _LLAMA_HEADS,
    SiteTable(NEURONS, producers=linears("mlp.gate_proj", "mlp.up_proj"), consumer="mlp.down_proj"),
)

_OPT_SITES = (
    SiteTable(
        HEADS,
        producers=linears("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        consumer="self_attn.out_proj",
        unit_width="self_attn.head_dim",
        counts={"self_attn.num_heads": "units"},
        bypass=Bypass("self_attn", in_tuple=2, cache="past_key_values"),
    ),
    SiteTable(NEURONS, producers=linears("fc1"), consumer="fc2"),
)

_GPT_NEOX_SITES = (
    SiteTable(
        HEADS,
        producers=(Producer("attention.query_key_value", parts=3, by_unit=True),),
        consumer="attention.dense",
        unit_width="attention.head_size",
        bypass=Bypass("attention", in_tuple=2, cache="layer_past"),
    ),
    SiteTable(NEURONS, producers=linears("mlp.dense_h_to_4h"), consumer="mlp.dense_4h_to_h"),
)

_PHI_SITES = (replace(_LLAMA_HEADS, consumer="self_attn.dense"), MLP)

DECODERS = (
    Family("gpt2", ("gpt2",), "h", _GPT2_SITES, arguments=_NO_CACHE),
    Family(
        "llama",
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
        "layers",
        _LLAMA_SITES,
        note="a unit of heads is a head of keys and values with the query heads that share it",
        arguments=_NO_CACHE,
    ),
    Family("opt", ("opt",), "decoder.layers", _OPT_SITES, arguments=_NO_CACHE),
    Family("gpt-neox", ("gpt_neox",), "layers", _GPT_NEOX_SITES, arguments=_NO_CACHE),
    Family("phi", ("phi",), "layers", _PHI_SITES, arguments=_NO_CACHE),
)
