"""Wanda-sp and FLAP against their formulas, unit by unit, from texts and images that run one at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.models import shared_model
from helpers.pruning import data_for

from optin_cli.scoring import score as stage
from optin_cli.scoring.plan import Plan, make_plan
from optin_cli.scoring.settings import ScoreSettings

NAMES = ["bert", "gpt2", "gemma3", "opt", "t5", "vit", "swin", "albert"]


def plan_for(name: str, method: str) -> Plan:
    model = shared_model(name)
    return make_plan(model, data_for(model), ScoreSettings(method=method, samples=10, batch_size=4))


def alone(inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """One example without padding: of each stream by its own mask."""
    found = {key: value[row : row + 1] for key, value in inputs.items()}
    for name in [key for key in found if key.endswith("attention_mask")]:
        real = found[name][0].bool()
        prefix = name.removesuffix("attention_mask")
        for key in [k for k in found if (k.startswith("decoder_")) == (prefix == "decoder_")]:
            found[key] = found[key][:, real] if found[key].dim() == 2 else found[key]
    return found


def consumed(plan: Plan) -> dict[str, np.ndarray]:
    """Site -> all that its consumer is given, [tokens, features], in float64."""
    seen: dict[str, list[np.ndarray]] = {site.name: [] for site in plan.model.anatomy}

    def keep(site):
        def hook(_, inputs):
            seen[site.name].append(inputs[0].double().numpy().reshape(-1, inputs[0].shape[-1]))

        return plan.model.module.get_submodule(site.consumer).register_forward_pre_hook(hook)

    handles = [keep(site) for site in plan.model.anatomy]
    with torch.inference_mode():
        for batch in plan.calibration.batches:
            for row in range(len(batch)):
                plan.model.output(alone(batch.inputs, row))
    for handle in handles:
        handle.remove()
    return {name: np.concatenate(parts) for name, parts in seen.items()}


def weight_of(plan: Plan, site) -> np.ndarray:
    """[outputs, features]"""
    layer = plan.model.module.get_submodule(site.consumer)
    weight = layer.weight.detach().double().numpy()
    return weight.T if type(layer).__name__ == "Conv1D" else weight


@pytest.mark.parametrize("name", NAMES)
def test_wanda_sp_is_weights_times_norms(name, tmp_path):
    plan = plan_for(name, "wanda-sp")
    found = stage.score(plan, tmp_path / "r.h5")
    given = consumed(plan)
    for site, ranked in zip(plan.model.anatomy, found.sites, strict=True):
        x, w = given[site.name], weight_of(plan, site)
        for unit in range(site.units):
            expected = 0.0
            for j in range(unit * site.width, (unit + 1) * site.width):
                expected += np.abs(w[:, j]).sum() * np.linalg.norm(x[:, j])
            assert ranked.score[unit] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_flap_is_the_standardised_fluctuation(name, tmp_path):
    """The order of all units by score per MAC is that of the metric, and differences are in proportion."""
    plan = plan_for(name, "flap")
    found = stage.score(plan, tmp_path / "r.h5")
    given, expected, scores = consumed(plan), [], []
    for site, ranked in zip(plan.model.anatomy, found.sites, strict=True):
        metric = given[site.name].var(axis=0) * np.linalg.norm(weight_of(plan, site), axis=0) ** 2
        metric = (metric - metric.mean()) / metric.std()
        expected += metric.reshape(site.units, site.width).mean(1).tolist()
        scores += (ranked.score / site.macs_per_unit(found.tokens)).tolist()
    np.testing.assert_allclose(scores, np.array(expected) - min(expected), rtol=1e-3, atol=1e-4)


def test_batches_add_up_to_all_tokens(tmp_path):
    """Norms and variances are of all tokens, however the texts are cut into batches."""
    model = shared_model("bert")
    for method in ("flap", "wanda-sp"):
        one, two = (
            stage.score(
                make_plan(
                    model,
                    data_for(model),
                    ScoreSettings(method=method, samples=10, batch_size=size),
                ),
                tmp_path / f"{method}-{size}.h5",
            )
            for size in (10, 3)
        )
        for a, b in zip(one.sites, two.sites, strict=True):
            np.testing.assert_allclose(a.score, b.score, rtol=1e-4, atol=1e-6 * a.score.max())
