"""Tasks of speech models: a class, or a transcript."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from optin_cli.data.batches import DECODER, Batches
from optin_cli.data.readers import TRANSCRIPTS, lines
from optin_cli.errors import InputError, first_line
from optin_cli.tasks import metrics
from optin_cli.tasks.base import Inputs, Task
from optin_cli.tasks.quiet import quiet_transformers
from optin_cli.tasks.seq2seq import TextToText

AUDIO = "audio-classification"
SPEECH = "speech-recognition"
_WITHOUT_SPACES = ("zh", "ja", "th", "lo", "my", "yue")
"""Languages that part no words: each letter counts as one."""


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
    """Each token of a transcript after those before it, from the recording; and the transcript, written greedily."""

    name = SPEECH
    auto_class = "AutoModelForSpeechSeq2Seq"
    architectures = ("WhisperForConditionalGeneration",)
    reader = TRANSCRIPTS
    main = ("word_error_rate", *TextToText.main)

    def encoded(self, module: nn.Module, inputs: Inputs) -> Mapping[str, Any]:
        """The encoder is by far the most of the work on a short recording."""
        encoder: Any = module.get_encoder()  # type: ignore[operator]
        read = {name: value for name, value in inputs.items() if name.startswith(DECODER)}
        return {"encoder_outputs": encoder(**{k: v for k, v in inputs.items() if k not in read}), **read}

    def write(self, module: nn.Module, inputs: Mapping[str, Any], processor: Any) -> list[str]:
        """Transcripts, greedily and with the model's caches, as long as its generation config lets them be.

        Raises `InputError` where `generate` refuses the language of the tokenizer or the generation config.
        """
        tokenizer = processor.text.tokenizer
        heard = {name: value for name, value in inputs.items() if not name.startswith(DECODER)}
        prompt = _prompt(module, tokenizer)
        try:
            with quiet_transformers():  # it deprecates how its own classes call each other
                ids = module.generate(**heard, **prompt, do_sample=False, num_beams=1)  # type: ignore[operator]
        except ValueError as error:
            raise InputError(
                f"the model does not write transcripts: {first_line(error)}",
                "take the generation_config.json and the tokenizer that came with it",
            ) from error
        return list(tokenizer.batch_decode(ids, skip_special_tokens=True))

    def texts(self, batches: Batches) -> list[str]:
        """The transcripts of the data, whole."""
        return lines(batches.examples.rows[batches.examples.columns.text[0]][:])

    def text_metrics(
        self, module: nn.Module, texts: Sequence[str], wanted: Sequence[str], processor: Any
    ) -> dict[str, float]:
        """`word_error_rate` and `character_error_rate` of texts that are normalised as Whisper's authors do."""
        normal = _normaliser(module, processor.text.tokenizer)
        return metrics.error_rates(
            *([" ".join(normal(text).split()) for text in side] for side in (texts, wanted))
        )

    def lost(self, metric: str, ours: float, baseline: float) -> float:
        """Return by how many points an error rate rises."""
        return ours - baseline if metric.endswith("error_rate") else super().lost(metric, ours, baseline)


def _multilingual(module: nn.Module) -> bool:
    """Return whether a Whisper takes a language: it may as well be a model of one, or no Whisper."""
    config: Any = module.generation_config
    return bool(getattr(config, "is_multilingual", False) and hasattr(config, "lang_to_id"))


def _prompt(module: nn.Module, tokenizer: Any) -> dict[str, str]:
    """The language and task that `generate` is asked for: those that the tokenizer puts before a transcript."""
    if not _multilingual(module):
        return {}
    found = {name: getattr(tokenizer, name, None) for name in ("language", "task")}
    return {name: value for name, value in found.items() if value}


def _normaliser(module: nn.Module, tokenizer: Any) -> Callable[[str], str]:
    """Without case, punctuation and what stands in brackets; of English with its numbers, contractions and spellings
    written in one way."""
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    language = (getattr(tokenizer, "language", None) or "").lower()
    code = TO_LANGUAGE_CODE.get(language, language)
    english_only = getattr(module.generation_config, "is_multilingual", None) is False
    if code == "en" or (not code and english_only):
        return EnglishTextNormalizer(getattr(tokenizer, "english_spelling_normalizer", None) or {})
    return BasicTextNormalizer(split_letters=code in _WITHOUT_SPACES)
