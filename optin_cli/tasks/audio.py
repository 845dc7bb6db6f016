"""Tasks of speech models: a class, or a transcript."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optin_cli.data.readers import TRANSCRIPTS
from optin_cli.tasks.base import Task
from optin_cli.tasks.seq2seq import TextToText

AUDIO = "audio-classification"
SPEECH = "speech-recognition"


@dataclass(frozen=True)
class AudioClassification(Task):
    """Classes of recordings."""

    name = AUDIO
    auto_class = "AutoModelForAudioClassification"
    architectures = ("ForAudioClassification",)

    @classmethod
    def from_config(cls, config: Any, folder: Path | None) -> Task:
        """A head on the weighted sum of all blocks' outputs reads them all."""
        kind = _OnAllBlocks if getattr(config, "use_weighted_layer_sum", False) else cls
        return kind._of_classes(config)


@dataclass(frozen=True)
class _OnAllBlocks(AudioClassification):
    reads_stages = True


@dataclass(frozen=True)
class SpeechRecognition(TextToText):
    """Each token of a transcript after those before it, from the recording."""

    name = SPEECH
    auto_class = "AutoModelForSpeechSeq2Seq"
    architectures = ("WhisperForConditionalGeneration",)
    reader = TRANSCRIPTS
