"""Models whose head is of no task: they are scored on the hidden states that the head reads, and keep it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from optin_cli.tasks.base import Forward, Inputs, Task
from optin_cli.tasks.embedding import Embedding

HIDDEN_STATES = "hidden-states"


@dataclass(frozen=True)
class HiddenStates(Embedding):
    """The base model without its head, which is written unchanged: its hidden states, a mean over the tokens."""

    name = HIDDEN_STATES

    @classmethod
    def from_config(cls, config: Any, folder: Path | None) -> Task:
        return cls(pooling="mean")

    def body(self, model: Forward) -> Forward:
        return getattr(model, "base_model", model)

    def output(self, model: Forward, inputs: Inputs) -> Tensor:
        return super().output(self.body(model), inputs)
