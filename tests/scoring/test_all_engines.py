"""The engines against brute force, on further families."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.brute_force import calibrate, change, forward
from helpers.families import TIMM_CNNS
from helpers.models import shared_model
from helpers.promises import SWINS

from optin_cli.execution.hooks import block_outputs
from optin_cli.scoring.calibration import Calibration, measured_blocks
from optin_cli.scoring.methods.ablation import Ablation
from optin_cli.scoring.methods.curvature import curvature

MEASURED = [
    "gpt2",
    "llama",
    "opt",
    "gpt-neox",
    "t5",
    "whisper",
    "whisper-classifier",
    "whisper-all-blocks",
    "beit",
    "beit-shared",
    "dinov2-swiglu",
    "clip-text-projected",
    "deberta",
    "deberta-v2",
    "deberta-v3",
    "modernbert",
    "timm-eva-mixed",
    "timm-eva02",
    *SWINS,
    *TIMM_CNNS,
    "segformer",
]


@pytest.mark.parametrize("name", [*MEASURED, "mask2former-swin"])
def test_ablation_equals_a_full_forward(name):
    calibration = calibrate(shared_model(name))
    ablation = Ablation(calibration, 0)
    for site in calibration.model.anatomy:
        units = np.arange(site.units)[:: max(1, site.units // 4)]
        trajectory, output = ablation.score(site, units)
        for row, unit in enumerate(units):
            expected, changed = change(calibration, site, unit, 0.0)
            np.testing.assert_allclose(trajectory[row], expected, rtol=1e-3, atol=1e-9)
            assert output[row] == pytest.approx(changed, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("name", MEASURED)
def test_curvature_estimates_the_change_of_a_small_step(name):
    """Oracle: full forwards with a small part of a unit gone, where the second-order term is all there is."""
    calibration = calibrate(shared_model(name))
    count, step = 100, 0.02
    found = curvature(calibration, 0, list(calibration.model.anatomy), range(count))
    examples = sampled_examples(calibration)
    dense, _ = forward(calibration, {})
    for site in calibration.model.anatomy:
        for unit in np.arange(site.units)[:: max(1, site.units // 4)]:
            mask = torch.ones(site.units)
            mask[unit] = 1 - step
            variant, _ = forward(calibration, {site.name: mask})
            columns = measured_blocks(site, len(calibration.model.anatomy.blocks))
            exact = [across_examples(dense[z], variant[z], examples[z]) / step**2 for z in columns]
            # some units of a tiny model do next to nothing: a step of theirs is lost in rounding
            np.testing.assert_allclose(
                found.trajectory[site.name][unit] / count, exact, rtol=0.35, atol=1e-10
            )
            output = change(calibration, site, unit, 1 - step)[1] / step**2
            assert found.output[site.name][unit] / count == pytest.approx(output, rel=0.35, abs=1e-10)


def sampled_examples(calibration: Calibration) -> dict[int, torch.Tensor]:
    """Which example each sampled row of batch 0 is a position of, for every block."""
    batch = calibration.batch(0)
    features: dict[int, torch.Tensor] = {}
    with torch.inference_mode(), block_outputs(calibration.model, features):
        calibration.model.output(batch.inputs)
    rows = calibration.feature_rows(0, [batch], {z: [f.shape[1]] for z, f in features.items()})
    return {z: rows[z][0] // f.shape[1] for z, f in features.items()}


def across_examples(dense: torch.Tensor, variant: torch.Tensor, examples: torch.Tensor) -> float:
    """||E F^T + F E^T||^2 / K^2 less the products that two rows of one example share: what probes estimate."""
    product = (variant - dense) @ dense.t()  # (K, K)
    same = examples[:, None] == examples[None, :]
    total = 2 * product.square().sum() + 2 * (product * product.t())[same].sum()
    return float(total) / len(dense) ** 2
