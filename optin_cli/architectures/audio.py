"""The tables of models that read recordings."""

from __future__ import annotations

from optin_cli.architectures.decoders import BART_SITES, BART_STREAMS
from optin_cli.architectures.schema import Family
from optin_cli.structure.anatomy import AUDIO

AUDIOS = (
    Family(
        "whisper",
        ("whisper",),
        "",
        BART_SITES,
        AUDIO,
        streams=BART_STREAMS,
        arguments={"use_cache": False},
        hierarchical=True,  # an encoder sees as many positions whatever is said, a decoder far fewer
        note="MACs are counted for a transcript of 64 tokens",
    ),
)
