"""Words that are hidden in a text: what BERT and its kin were trained for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from optin_cli.data.batches import Batches
from optin_cli.data.readers import MASKED_TEXT, Reader, masked_positions
from optin_cli.tasks.base import Forward, Inputs, ones
from optin_cli.tasks.language import NextToken, logits_at, mean_nats, padded

MASKED_LANGUAGE = "masked-language-modeling"

_ROWS = 16
"""Of a text, so many masked tokens are compared while scoring, from the first on: however a batch is cut into pieces
of one length, they are the same."""


@dataclass(frozen=True)
class MaskedLanguageModeling(NextToken):
    """A row for each masked token, whose classes are the tokens that it may be.

    Every seventh token is masked, about the 15 % of BERT's own training (Devlin et al. 2019), so that outputs are the
    same at every run. A model of several pretraining heads is scored on its predictions of tokens.
    """

    name = MASKED_LANGUAGE
    auto_class = "AutoModelForMaskedLM"
    architectures = (
        "ForMaskedLM", "AlbertForPreTraining", "BigBirdForPreTraining", "BertForPreTraining", "ErnieForPreTraining",
        "FNetForPreTraining",
    )  # fmt: skip
    reader: ClassVar[Reader] = MASKED_TEXT

    def output(self, model: Forward, inputs: Inputs) -> Tensor:
        """Logits of the first masked tokens of each text."""
        return self._logits(model, inputs, _ROWS)

    def row_weights(self, inputs: Inputs) -> Tensor:
        """Padding counts nothing."""
        return self._weights(inputs, _ROWS)

    def full_output(self, model: Forward, inputs: Inputs) -> Tensor:
        return self._logits(model, inputs, None)

    def full_weights(self, inputs: Inputs) -> Tensor:
        return self._weights(inputs, None)

    def labels(self, batches: Batches) -> list[list[int]]:
        """What each masked token was; `IGNORE` for special tokens, which are not masked."""
        return batches.encoded.details

    def loss(self, output: Tensor, labels: Sequence[Any]) -> Tensor:
        """The mean negative log likelihood of the first masked tokens of each text."""
        return mean_nats(output, padded(labels, output.shape[1]))

    def _logits(self, model: Forward, inputs: Inputs, most: int | None) -> Tensor:
        return logits_at(model, inputs, self._positions(inputs, most)).float()

    def _weights(self, inputs: Inputs, most: int | None) -> Tensor:
        mask = inputs.get("attention_mask")
        positions = self._positions(inputs, most)
        return ones(inputs, len(positions)) if mask is None else mask[:, positions.to(mask.device)].float()

    def _positions(self, inputs: Inputs, most: int | None) -> Tensor:
        return torch.tensor(masked_positions(inputs["input_ids"].shape[1])[:most])
