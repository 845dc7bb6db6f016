"""A text made from another: what an encoder-decoder is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from optin_cli.data.batches import DECODER, MASK, Batches
from optin_cli.data.readers import TARGETS, Reader
from optin_cli.tasks.base import Forward, Inputs, logits_of
from optin_cli.tasks.language import NextToken, logits_at, mean_nats, padded

SEQ2SEQ = "text-to-text"
DECODER_MASK = f"{DECODER}{MASK}"

_ROWS = 16
"""Of a target, so many tokens' predictions are compared while scoring, from the first on: however a batch is cut into
pieces of one length, they are the same."""


@dataclass(frozen=True)
class TextToText(NextToken):
    """Each token of a target after those before it, from the whole source."""

    name = SEQ2SEQ
    auto_class = "AutoModelForSeq2SeqLM"
    architectures: ClassVar[tuple[str, ...]] = ("ForConditionalGeneration", "MTModel", "EncoderDecoderModel")
    reader: ClassVar[Reader] = TARGETS

    def output(self, model: Forward, inputs: Inputs) -> Tensor:
        """Logits of the first tokens of each target."""
        return logits_at(model, inputs, slice(_ROWS)).float()

    def row_weights(self, inputs: Inputs) -> Tensor:
        """Padding counts nothing."""
        return inputs[DECODER_MASK][:, :_ROWS].float()

    def full_output(self, model: Forward, inputs: Inputs) -> Tensor:
        return logits_of(model(**inputs)).float()

    def full_weights(self, inputs: Inputs) -> Tensor:
        return inputs[DECODER_MASK].float()

    def labels(self, batches: Batches) -> list[list[int]] | None:
        """The tokens of each target; None for the caller's own batches, which hold what the decoder reads alone."""
        return batches.encoded.details or None

    def loss(self, output: Tensor, labels: Sequence[Any]) -> Tensor:
        """The mean negative log likelihood of the first tokens of each target."""
        return mean_nats(output, padded(labels, output.shape[1]))
