"""The tables of models that read recordings."""

from __future__ import annotations

from optin_cli.architectures.schema import Family, SiteTable, StreamTable, linears
from optin_cli.structure.anatomy import AUDIO, HEADS, NEURONS, Bypass

# the keys have no bias; a decoder's block attends to itself and to the encoder's output
_WHISPER_SELF, _WHISPER_CROSS = (
    SiteTable(
        HEADS,
        name=name,
        producers=linears(f"{module}.q_proj", f"{module}.k_proj", f"{module}.v_proj"),
        consumer=f"{module}.out_proj",
        unit_width=f"{module}.head_dim",
        counts={f"{module}.num_heads": "units"},
        bypass=Bypass(module, in_tuple=2, cache="past_key_values", attended=attended),
        requires=(module,),
    )
    for module, name, attended in (("self_attn", "", ""), ("encoder_attn", "cross", "key_value_states"))
)

AUDIOS = (
    Family(
        "whisper",
        ("whisper",),
        "",
        (_WHISPER_SELF, _WHISPER_CROSS, SiteTable(NEURONS, producers=linears("fc1"), consumer="fc2")),
        AUDIO,
        streams=(StreamTable("encoder.layers"), StreamTable("decoder.layers", mask="decoder_attention_mask")),
        arguments={"use_cache": False},
        hierarchical=True,  # an encoder sees as many positions whatever is said, a decoder far fewer
        note="MACs are counted for a transcript of 64 tokens",
    ),
)
