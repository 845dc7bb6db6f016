"""Processors that turn recordings into spectrograms, and transcripts into what a decoder reads."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from optin_cli.data.audio import Recording, resampled
from optin_cli.errors import InputError, first_line
from optin_cli.loading.custom_code import check_part
from optin_cli.loading.processors import TextProcessor, text_processor, tokenizing
from optin_cli.structure.audio_inputs import FEATURES, feature_shape


@dataclass
class AudioProcessor:
    """A feature extractor of transformers; with the tokenizer of the transcripts, where the model has a decoder."""

    extractor: Any
    text: TextProcessor | None = None
    input_name: str = FEATURES

    def __call__(self, recording: Recording) -> Tensor:
        """The spectrogram, (bins, frames): silence is added to what is too short, what is too long is cut."""
        rate = self.extractor.sampling_rate
        found = self.extractor(resampled(recording, rate), sampling_rate=rate, return_tensors="pt")
        return found[self.input_name][0]

    def with_transcripts(
        self, texts: Sequence[str], max_length: int | None
    ) -> tuple[list[dict[str, list[int]]], list[list[int]]]:
        """Return what the decoder reads of transcripts, all but the last token; and their token ids."""
        assert self.text is not None
        return self.text.decoded(texts, max_length)

    def pad(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """One batch of what the decoder reads."""
        assert self.text is not None
        return self.text.pad(rows)


def audio_processor(
    folder: Path, config: Any, transcripts: bool, trust_remote_code: bool = False
) -> AudioProcessor:
    """The feature extractor of a transformers model directory; its tokenizer too, for `transcripts`.

    Raises `InputError` when the directory lacks one, or has one for other spectrograms than the model's.
    """
    from transformers import AutoFeatureExtractor

    try:
        check_part(folder, "feature extractor", trust_remote_code)
        extractor = AutoFeatureExtractor.from_pretrained(
            folder, config=config, trust_remote_code=trust_remote_code
        )
    except InputError:
        raise
    except Exception as error:  # whatever its file holds
        raise InputError(
            f"{folder} has no usable feature extractor: {first_line(error)}",
            "put preprocessor_config.json beside config.json",
        ) from error
    text = text_processor(folder, config, trust_remote_code) if transcripts else None
    processor = AudioProcessor(extractor, text)
    silence = Recording(np.zeros(extractor.sampling_rate, np.float32), extractor.sampling_rate)
    given, wanted = tuple(processor(silence).shape), feature_shape(config)
    if given != wanted:
        raise InputError(
            f"the feature extractor in {folder} gives spectrograms of {given[0]} x {given[1]}, and the model takes "
            f"{wanted[0]} x {wanted[1]}",
            "take the preprocessor_config.json that came with the model",
        )
    return processor


def given_audio_processor(given: Any, config: Any) -> AudioProcessor:
    """The same from a feature extractor, or a processor that holds one and a tokenizer."""
    tokenizer = getattr(given, "tokenizer", None)
    text = tokenizing(copy.deepcopy(tokenizer), config) if tokenizer is not None else None
    return AudioProcessor(getattr(given, "feature_extractor", given), text)
