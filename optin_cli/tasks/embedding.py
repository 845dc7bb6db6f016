"""One vector for each text or image, compared by its direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optin_cli.data.batches import Batches
from optin_cli.data.labels import check_varied, number_labels
from optin_cli.data.readers import SIDES
from optin_cli.errors import InputError, param
from optin_cli.tasks import metrics
from optin_cli.tasks.base import Forward, Inputs, Task
from optin_cli.tasks.divergence import SQUARES
from optin_cli.tasks.pooling import MEAN, pooled, read_pooling

EMBEDDING = "embedding"
PROJECTED = "WithProjection"
"""Ends the names of classes whose embedding is a projection into a space that two towers share."""
_GIVEN = ("image_embeds", "text_embeds", "last_hidden_state", "pooler_output")
"""What an output may hold, the first is taken: a pooled vector is one where there is nothing before it (DPR)."""


@dataclass(frozen=True)
class Embedding(Task):
    """A unit-length vector. Of pairs of texts each side is an example, and a label says how alike they are."""

    name = EMBEDDING
    auto_class = "AutoModel"
    architectures = ()
    reader = SIDES
    term = SQUARES
    main = ("spearman",)

    pooling: str = MEAN
    """A name of `tasks.pooling`, several joined by `+`, or `none` (already one vector)."""

    @classmethod
    def from_config(cls, config: Any, folder: Path | None) -> Task:
        return cls(pooling=read_pooling(folder))

    def output(self, model: Forward, inputs: Inputs) -> Tensor:
        """Unit-length sentence (or image) vectors, [batch, 1, hidden]."""
        result, attention_mask = model(**inputs), inputs.get("attention_mask")
        hidden = (result if isinstance(result, Tensor) else _hidden_or_projection(result)).float()
        if hidden.dim() == 2 or self.pooling == "none":
            vectors = hidden
        else:
            vectors = pooled(hidden, attention_mask, self.pooling)
        return nn.functional.normalize(vectors, dim=-1)[:, None, :]

    def labels(self, batches: Batches) -> list[float] | None:
        """Return how alike the texts of each pair are."""
        labels = batches.labels() if batches.separate else None
        return None if labels is None else number_labels(labels, batches.examples.where)

    def targets(self, batches: Batches) -> list[float] | None:
        """The same divided by the largest, which should be that of equal texts."""
        labels, where = self.labels(batches), batches.examples.where
        if labels is None:
            return None
        check_varied(labels, where)
        largest = max(labels)
        if largest <= 0:
            raise InputError(
                f"the largest similarity in {where} is {largest:g}: it should be that of equal texts"
            )
        return [value / largest for value in labels]

    def needed(self, batches: Batches) -> str | None:
        return None if batches.separate else "two text columns and their similarity as label"

    def metrics(self, kept: Sequence[Any], labels: Any, batches: Batches) -> dict[str, float]:
        # example 2 * row + side: even examples are first sentences, odd ones second
        vectors = torch.stack(list(kept))
        cosines = torch.nn.functional.cosine_similarity(vectors[0::2], vectors[1::2], dim=-1)
        return metrics.correlation(cosines.numpy(), labels, batches.examples.where)

    def compare(self, output: Tensor, baseline: Tensor, weights: Tensor) -> dict[str, float]:
        return {}

    def fidelity(
        self, sums: Mapping[str, float], ours: Sequence[Any], theirs: Sequence[Any], device: torch.device
    ) -> dict[str, float]:
        mine, dense = (torch.stack(list(side)) for side in (ours, theirs))
        found = {"cosine": metrics.mean_cosine(mine, dense)}
        if len(mine) > 1:
            found["top10_overlap"] = metrics.neighbour_overlap(mine.to(device), dense.to(device))
        return found


def _hidden_or_projection(result: Any) -> Tensor:
    """Hidden states [batch, tokens, hidden], or [batch, dim] where the model projects or pools them itself.

    Raises `InputError` for a model that gives neither.
    """
    found = next((getattr(result, name) for name in _GIVEN if getattr(result, name, None) is not None), None)
    if found is None:
        given = ", ".join(result) if isinstance(result, Mapping) else type(result).__name__
        raise InputError(
            f"there is no embedding in what the model gives ({given})",
            f"an embedding model gives {', '.join(_GIVEN)} or a tensor; choose another {param('task')}",
        )
    return found
