"""What Fisher scores are made of, by autograd: each example through the whole model alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from optin_cli.scoring import score as stage
from optin_cli.scoring.plan import Plan
from optin_cli.transforms.masking import masked


def mask_gradients(plan: Plan, loss: Callable[[int], torch.Tensor]) -> dict[str, np.ndarray]:
    """d loss / d mask, (rows, units); `loss` is that of a row by its position among those drawn."""
    model = plan.model
    found = {site.name: [] for site in model.anatomy}
    for row in range(len(plan.examples.row_ids)):
        masks = {site.name: torch.ones(site.units, requires_grad=True) for site in model.anatomy}
        with torch.enable_grad(), masked(model.module, model.anatomy, masks):
            value = loss(row)
        for name, gradient in zip(masks, torch.autograd.grad(value, list(masks.values())), strict=True):
            found[name].append(gradient.numpy())
    return {name: np.stack(rows) for name, rows in found.items()}


def check_fisher(
    plan: Plan, path: Path, texts: list[str], truth: np.ndarray, loss: Callable[..., torch.Tensor]
) -> None:
    """Scores are the mean squared gradients of `loss(logits, labels)` of single texts. Writes a ranking to `path`."""

    def of_row(row: int) -> torch.Tensor:
        text = plan.examples.row_ids[row]
        inputs = plan.model.processor.tokenizer(texts[text], return_tensors="pt")
        return loss(plan.model.module(**inputs).logits[0], torch.tensor(truth[text]).float())

    expected = mask_gradients(plan, of_row)
    for site in stage.score(plan, path).sites:
        squares = (expected[site.name] ** 2).mean(0)
        np.testing.assert_allclose(site.score, squares, rtol=2e-3, atol=1e-6)
