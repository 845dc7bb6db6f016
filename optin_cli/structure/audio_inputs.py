"""Inputs of speech models: spectrograms of one size, and the transcript so far where there is a decoder."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from optin_cli.errors import InputError

TRANSCRIPT = 64
"""Tokens of the transcript that costs are counted for, unless the model takes fewer."""
FEATURES = "input_features"
_TOKENS = "decoder_input_ids"


def feature_shape(config: Any) -> tuple[int, int]:
    """(bins, frames) of the spectrograms that a model takes: two frames become one position.

    Raises `InputError` where its config does not say.
    """
    bins, positions = (getattr(config, name, None) for name in ("num_mel_bins", "max_source_positions"))
    if not bins or not positions:
        raise InputError(
            f"the config of a {getattr(config, 'model_type', '')} model does not say which spectrograms it takes",
            "num_mel_bins and max_source_positions do",
        )
    return bins, 2 * positions


def has_decoder(model: nn.Module) -> bool:
    """Return whether the model reads a transcript as well."""
    return _TOKENS in inspect.signature(model.forward).parameters


def transcript_length(config: Any) -> int:
    """Tokens of the transcript that costs are counted for."""
    return min(TRANSCRIPT, config.max_target_positions)


def sizes(model: nn.Module) -> tuple[int, int]:
    """Return the size to time a model at and its largest: tokens of the transcript, or frames without a decoder."""
    config: Any = model.config
    if has_decoder(model):
        return transcript_length(config), config.max_target_positions
    frames = feature_shape(config)[1]
    return frames, frames


def random_recordings(
    model: nn.Module, batch_size: int, tokens: int | None = None, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Random inputs on the CPU: spectrograms (batch, bins, frames), and transcripts (batch, tokens) without padding
    where there is a decoder."""
    config: Any = model.config
    inputs = {FEATURES: torch.randn(batch_size, *feature_shape(config), generator=generator)}
    if has_decoder(model):
        size = (batch_size, tokens or transcript_length(config))
        inputs[_TOKENS] = torch.randint(config.vocab_size, size, generator=generator)
        inputs["decoder_attention_mask"] = torch.ones_like(inputs[_TOKENS])
    return inputs
