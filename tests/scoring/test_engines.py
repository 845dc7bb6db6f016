"""Ablation against full masked forwards; curvature against ablation; both on every kind of family."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import ALL, shared_model, tiny_image_folder, tiny_text_csv
from scipy.stats import spearmanr

from optin_cli.data.batches import Batches
from optin_cli.data.examples import sample
from optin_cli.data.sources import DataSpec
from optin_cli.errors import InputError
from optin_cli.models.checkpoint import OpenModel
from optin_cli.models.masking import masked
from optin_cli.models.tasks import EMBEDDING
from optin_cli.scoring.ablation import Ablation
from optin_cli.scoring.calibration import Calibration, block_outputs, mean_tokens, measured_blocks
from optin_cli.scoring.curvature import curvature
from optin_cli.scoring.losses import output_change, relational_change, unit_rows


def calibrate(model: OpenModel, folder, rows: int = 24, samples: int = 12) -> Calibration:
    image = model.family.modality == "image"
    data = tiny_image_folder(folder) if image else tiny_text_csv(folder)
    separate = model.task.name == EMBEDDING
    found = sample(DataSpec(str(data)), model.family.modality, samples, 0, separate=separate)
    return Calibration(model, Batches(found, model.processor, 6, separate=separate), rows, 4.0, seed=0)


def naive(calibration: Calibration, index: int, site, unit: int) -> tuple[list[float], float]:
    """Scores of one unit by two full forwards, as the definition says."""
    model = calibration.model
    inputs = calibration.batch(index).inputs
    mask = torch.ones(site.units)
    mask[unit] = 0
    dense, variant = {}, {}
    with torch.inference_mode():
        with block_outputs(model, dense):
            y = model.output(inputs)
        with block_outputs(model, variant), masked(model.module, model.anatomy, {site.name: mask}):
            y_without = model.output(inputs)
    rows = calibration.sampled_rows(index, calibration.batch(index), dense[0].shape[1])

    def rows_of(features):
        return unit_rows(features.reshape(-1, features.shape[-1])[rows])

    columns = measured_blocks(site, len(model.anatomy.blocks))
    trajectory = [float(relational_change(rows_of(dense[z]), rows_of(variant[z])[None])) for z in columns]
    weights = model.task.row_weights(inputs)
    settings = {"temperature": calibration.temperature, "regression": model.task.regression}
    return trajectory, float(output_change(y, y_without[None], weights, **settings))


@pytest.mark.parametrize("name", ALL)
def test_ablation_equals_a_full_forward_for_every_unit(name, tmp_path):
    calibration = calibrate(shared_model(name), tmp_path)
    ablation = Ablation(calibration, 1)
    for site in calibration.model.anatomy:
        trajectory, output = ablation.score(site)
        for unit in range(0, site.units, 7 if site.units > 8 else 1):
            expected, changed = naive(calibration, 1, site, unit)
            np.testing.assert_allclose(trajectory[unit], expected, rtol=1e-3, atol=1e-9)
            assert output[unit] == pytest.approx(changed, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("name", ["bert", "mpnet", "timm-vit"])
def test_the_expanded_run_agrees_with_the_broadcast_one(name, tmp_path, monkeypatch):
    calibration = calibrate(shared_model(name), tmp_path)
    ablation = Ablation(calibration, 0)
    site = calibration.model.anatomy["blocks.1.heads"]
    assert ablation._broadcasts(site)
    fast = ablation.score(site)
    monkeypatch.setattr(ablation, "_broadcasts", lambda site: False)
    for one, two in zip(fast, ablation.score(site), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("head", ["encoder", "tagger", "reader"])
def test_ablation_serves_every_task(head, tmp_path):
    calibration = calibrate(shared_model("bert", head), tmp_path)
    site = calibration.model.anatomy["blocks.2.heads"]
    trajectory, output = Ablation(calibration, 0).score(site)
    for unit in range(site.units):
        expected, changed = naive(calibration, 0, site, unit)
        np.testing.assert_allclose(trajectory[unit], expected, rtol=1e-3, atol=1e-9)
        assert output[unit] == pytest.approx(changed, rel=1e-3, abs=1e-9)


def test_one_variant_at_a_time_gives_the_same_scores(tmp_path, monkeypatch):
    calibration = calibrate(shared_model("bert"), tmp_path)
    ablation = Ablation(calibration, 0)
    site = calibration.model.anatomy["blocks.0.neurons"]
    many = ablation.score(site)
    monkeypatch.setattr(ablation, "variants_per_call", lambda: 1)
    for one, two in zip(many, ablation.score(site), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("name", ["bert", "distilbert", "vit", "timm-vit"])
def test_curvature_estimates_the_squared_derivative_of_the_trajectory(name, tmp_path):
    """Oracle: ablation of a small fraction of a unit, where the second-order term is all there is."""
    calibration = calibrate(shared_model(name), tmp_path)
    model = calibration.model
    found = curvature(calibration, 0, 400, list(model.anatomy))
    inputs = calibration.batch(0).inputs
    step = 0.02
    for site in model.anatomy:
        exact = []
        for unit in range(0, site.units, max(1, site.units // 4)):
            mask = torch.ones(site.units)
            mask[unit] = 1 - step
            dense, variant = {}, {}
            with torch.inference_mode():
                with block_outputs(model, dense):
                    model.output(inputs)
                with block_outputs(model, variant), masked(model.module, model.anatomy, {site.name: mask}):
                    model.output(inputs)
            rows = calibration.sampled_rows(0, calibration.batch(0), dense[0].shape[1])
            total = 0.0
            for z in measured_blocks(site, len(model.anatomy.blocks)):
                pair = [unit_rows(f[z].flatten(0, 1)[rows]) for f in (dense, variant)]
                total += float(relational_change(pair[0], pair[1][None]))
            exact.append(total / step**2)
        estimate = found[site.name][0][:: max(1, site.units // 4), 0]
        np.testing.assert_allclose(estimate, exact, rtol=0.45)
        assert np.mean(estimate / np.array(exact)) == pytest.approx(1, abs=0.2)


def test_curvature_ranks_neurons_as_ablation_does(tmp_path):
    calibration = calibrate(shared_model("bert"), tmp_path, rows=64)
    ablation = Ablation(calibration, 0)
    found = curvature(calibration, 0, 300, list(calibration.model.anatomy))
    site = calibration.model.anatomy["blocks.0.neurons"]
    exact = ablation.score(site)
    assert spearmanr(found[site.name][0].sum(1), exact[0].sum(1))[0] > 0.9
    assert spearmanr(found[site.name][1], exact[1])[0] > 0.9


def test_no_gradient_ever_reaches_a_weight(tmp_path):
    calibration = calibrate(shared_model("bert"), tmp_path)
    curvature(calibration, 0, 2, list(calibration.model.anatomy))
    assert all(not p.requires_grad and p.grad is None for p in calibration.model.module.parameters())


def test_the_model_is_left_as_it_was(tmp_path):
    model = shared_model("mpnet")
    calibration = calibrate(model, tmp_path)
    inputs = calibration.batch(0).inputs
    with torch.inference_mode():
        before = model.output(inputs)
        Ablation(calibration, 0).score(model.anatomy["blocks.1.neurons"])
    curvature(calibration, 0, 1, list(model.anatomy))
    with torch.inference_mode():
        assert torch.equal(model.output(inputs), before)


def test_sampled_rows_are_real_tokens_and_fixed(tmp_path):
    calibration = calibrate(shared_model("bert"), tmp_path, rows=20)
    batch = calibration.batch(1)
    rows = calibration.sampled_rows(1, batch, batch.valid.shape[1])
    assert batch.valid.flatten()[rows].all()
    assert len(rows) == 20 == len(set(rows.tolist()))
    assert torch.equal(rows, calibration.sampled_rows(1, batch, batch.valid.shape[1]))


def test_padding_does_not_enter_the_scores(tmp_path):
    """The same texts, padded further, score the same."""
    calibration = calibrate(shared_model("bert"), tmp_path, rows=10_000)
    site = calibration.model.anatomy["blocks.1.heads"]
    plain = Ablation(calibration, 0).score(site)
    processor = calibration.batches.processor
    pad = processor.pad

    class Longer:
        def __getattr__(self, name):
            return getattr(processor, name)

        def pad(self, rows):
            inputs = pad(rows)
            return {k: torch.nn.functional.pad(v, (0, 7)) for k, v in inputs.items()}

    calibration.batches.processor = Longer()
    for one, two in zip(plain, Ablation(calibration, 0).score(site), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-9)


def test_mean_tokens_leaves_padding_out(tmp_path):
    calibration = calibrate(shared_model("bert"), tmp_path)
    total = sum(int(batch.valid.sum()) for batch in calibration.batches)
    assert mean_tokens(calibration) == pytest.approx(total / calibration.batches.count)
    images = calibrate(shared_model("vit"), tmp_path / "images")
    assert mean_tokens(images) == 17  # 4 x 4 patches and the class token


def test_activations_that_are_not_finite_name_block_and_batch(tmp_path):
    import copy

    calibration = calibrate(shared_model("bert"), tmp_path)
    broken = copy.deepcopy(calibration.model.module)
    broken.get_submodule(calibration.model.anatomy.blocks[1]).output.dense.weight[0, 0] = float("nan")
    calibration.model = OpenModel(
        calibration.model.source,
        broken,
        calibration.model.family,
        calibration.model.anatomy,
        calibration.model.task,
        calibration.model.stored_dtype,
    )
    for run in (
        lambda: Ablation(calibration, 1),
        lambda: curvature(calibration, 1, 1, list(calibration.model.anatomy)),
    ):
        with pytest.raises(InputError, match=r"block 1 .* batch 1"):
            run()
