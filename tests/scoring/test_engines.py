"""Ablation against full masked forwards; curvature against ablation; both on every kind of family."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.data import tiny_image_folder, tiny_text_csv
from helpers.families import ALL
from helpers.lazy import Lazy
from helpers.models import shared_model

from optin_cli.data.batches import Batches
from optin_cli.data.examples import sample
from optin_cli.data.sources import DataSpec
from optin_cli.errors import InputError
from optin_cli.execution.hooks import block_outputs
from optin_cli.execution.replay import Replay
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.scoring.calibration import Calibration, mean_tokens, measured_blocks
from optin_cli.scoring.losses import output_change, relational_change, unit_rows
from optin_cli.scoring.methods.ablation import Ablation
from optin_cli.scoring.methods.curvature import curvature
from optin_cli.scoring.passes import ProbeSums
from optin_cli.transforms.masking import masked

stats = Lazy("scipy.stats")


def calibrate(model: OpenModel, folder, rows: int = 24, samples: int = 12) -> Calibration:
    image = model.family.modality == "image"
    data = tiny_image_folder(folder) if image else tiny_text_csv(folder)
    found = sample(DataSpec(str(data)), model.family.modality, samples, 0, reader=model.task.reader)
    return Calibration(model, Batches(found, model.processor, 6, reader=model.task.reader), rows, 4.0, seed=0)


def measure(
    calibration: Calibration, index: int, masks: dict[str, torch.Tensor]
) -> tuple[dict, torch.Tensor]:
    """Unit rows of every block's feature, and the output, of one full padded forward under `masks`."""
    model, batch = calibration.model, calibration.batch(index)
    features = {}
    with (
        torch.inference_mode(),
        block_outputs(model, features),
        masked(model.module, model.anatomy, masks),
    ):
        output = model.output(batch.inputs)
    (rows,) = calibration.sampled_rows(index, [batch], [features[0].shape[1]])
    return {z: unit_rows(f.flatten(0, 1)[rows]) for z, f in features.items()}, output


def naive(
    calibration: Calibration, index: int, site, unit: int, kept: float = 0.0
) -> tuple[list[float], float]:
    """Scores of one unit by two full forwards, as the definition says; `kept` of it stays."""
    mask = torch.ones(site.units)
    mask[unit] = kept
    dense, y = measure(calibration, index, {})
    variant, y_without = measure(calibration, index, {site.name: mask})
    columns = measured_blocks(site, len(calibration.model.anatomy.blocks))
    trajectory = [float(relational_change(dense[z], variant[z][None])) for z in columns]
    task = calibration.model.task
    weights = task.row_weights(calibration.batch(index).inputs)
    settings = {"temperature": calibration.temperature, "term": task.term}
    return trajectory, float(output_change(y, y_without[None], weights, **settings) / weights.sum())


def every(site) -> np.ndarray:
    return np.arange(site.units)


@pytest.mark.parametrize("name", [ALL[0], *(pytest.param(name, marks=pytest.mark.slow) for name in ALL[1:])])
def test_ablation_equals_a_full_forward_for_every_unit(name, tmp_path):
    calibration = calibrate(shared_model(name), tmp_path)
    ablation = Ablation(calibration, 1)
    for site in calibration.model.anatomy:
        units = every(site)[:: 7 if site.units > 8 else 1]
        trajectory, output = ablation.score(site, units)
        for row, unit in enumerate(units):
            expected, changed = naive(calibration, 1, site, unit)
            np.testing.assert_allclose(trajectory[row], expected, rtol=1e-3, atol=1e-9)
            assert output[row] == pytest.approx(changed, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("name", ["bert", "mpnet", "timm-vit"])
def test_the_expanded_run_agrees_with_the_broadcast_one(name, tmp_path, monkeypatch):
    calibration = calibrate(shared_model(name), tmp_path)
    site = calibration.model.anatomy["blocks.1.heads"]
    ablation = Ablation(calibration, 0)
    assert all(replay.broadcasts(site) for replay in ablation.replays)
    fast = ablation.score(site, every(site))
    monkeypatch.setattr(Replay, "broadcasts", lambda *_: False)
    for one, two in zip(fast, Ablation(calibration, 0).score(site, every(site)), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("name", ["bert", "distilbert", "vit"])
def test_scores_by_changes_are_those_by_values(name, tmp_path):
    """What may be rounded is the arithmetic of changes: without rounding it is exact."""
    calibration = calibrate(shared_model(name), tmp_path)
    site = calibration.model.anatomy["blocks.0.neurons"]
    full = Ablation(calibration, 0).score(site, every(site))
    ablation = Ablation(calibration, 0, reduced=True)
    changes = ablation.score(site, every(site))
    assert all(len(replay.linears) == 12 for replay in ablation.replays)  # two blocks of six
    for one, two in zip(full, changes, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("name", ["bert", "distilbert", "vit"])
def test_reduced_products_change_little(name, tmp_path, reduced_products):
    calibration = calibrate(shared_model(name), tmp_path)
    site = calibration.model.anatomy["blocks.0.neurons"]
    full = Ablation(calibration, 0).score(site, every(site))
    rounded = Ablation(calibration, 0, reduced=True).score(site, every(site))
    for one, two in zip(full, rounded, strict=True):
        np.testing.assert_allclose(one, two, rtol=0.05, atol=1e-9)


@pytest.mark.parametrize("strata", [None, 1])
@pytest.mark.parametrize("name", ["bert", pytest.param("timm-vit", marks=pytest.mark.slow)])
def test_reduced_products_rank_units_as_exact_ones(name, strata, tmp_path, reduced_products, monkeypatch):
    """Blocks that share a backward pass, too, of which each product is rounded for all of them."""
    if not reduced_products:
        pytest.skip("needs a CPU with AMX: others round nothing")
    calibration = calibrate(shared_model(name), tmp_path)
    sites, passes = list(calibration.model.anatomy), strata and [tuple(range(3))]
    rounded = curvature(calibration, 0, sites, range(8), passes=passes)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    exact = curvature(calibration, 0, sites, range(8), passes=passes)
    for kind in ("heads", "neurons"):
        for part in ("trajectory", "output"):
            found, expected = (
                np.concatenate(
                    [
                        np.log(getattr(p, part)[s.name]).reshape(s.units, -1).sum(1)
                        for s in sites
                        if s.kind == kind
                    ]
                )
                for p in (rounded, exact)
            )
            assert not np.array_equal(found, expected)
            assert stats.spearmanr(found, expected).statistic > 0.99
            assert np.corrcoef(found, expected)[0, 1] > 0.99


@pytest.mark.parametrize("head", ["encoder", "tagger", "reader"])
def test_ablation_serves_every_task(head, tmp_path):
    calibration = calibrate(shared_model("bert", head), tmp_path)
    site = calibration.model.anatomy["blocks.2.heads"]
    trajectory, output = Ablation(calibration, 0).score(site, every(site))
    for unit in range(site.units):
        expected, changed = naive(calibration, 0, site, unit)
        np.testing.assert_allclose(trajectory[unit], expected, rtol=1e-3, atol=1e-9)
        assert output[unit] == pytest.approx(changed, rel=1e-3, abs=1e-9)


def test_one_variant_at_a_time_gives_the_same_scores(tmp_path):
    calibration = calibrate(shared_model("bert"), tmp_path)
    ablation = Ablation(calibration, 0)
    site = calibration.model.anatomy["blocks.0.neurons"]
    assert ablation.step > 1
    many = ablation.score(site, every(site))
    ablation.step = 1
    for one, two in zip(many, ablation.score(site, every(site)), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-10)


def test_out_of_memory_halves_the_variants_and_goes_on(tmp_path, monkeypatch):
    calibration = calibrate(shared_model("bert"), tmp_path)
    site = calibration.model.anatomy["blocks.1.neurons"]
    expected = Ablation(calibration, 0).score(site, every(site))
    run, limit = Replay.run, 5

    def small_memory(self, site, units, broadcast):
        if broadcast and len(units) > limit:
            raise torch.OutOfMemoryError("simulated")
        return run(self, site, units, broadcast)

    monkeypatch.setattr(Replay, "run", small_memory)
    ablation = Ablation(calibration, 0)
    told = []
    found = ablation.score(site, every(site), told.append)
    assert ablation.step <= limit
    assert sum(told) == site.units
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-10)
    limit = 0
    with pytest.raises(InputError, match=r"batch 0 does not fit .* one unit"):
        ablation.score(site, every(site))


def probed(calibration: Calibration, index: int, probes: int, sites=None) -> ProbeSums:
    return curvature(calibration, index, sites or list(calibration.model.anatomy), range(probes))


def without_shared(dense: torch.Tensor, variant: torch.Tensor, examples: torch.Tensor) -> float:
    """||E F^T + F E^T||^2 / K^2 less the products E_b F_c^T . F_b E_c^T of two examples b, c: what probes estimate."""
    product = (variant - dense) @ dense.t()  # (K, K)
    same = examples[:, None] == examples[None, :]
    total = 2 * product.square().sum() + 2 * (product * product.t())[same].sum()
    return float(total) / len(dense) ** 2


@pytest.mark.parametrize("name", ["bert", pytest.param("mpnet", marks=pytest.mark.slow), "timm-vit"])
def test_curvature_estimates_the_second_order_change(name, tmp_path):
    """Oracle: ablation of a small part of a unit, where the second-order term is all there is."""
    calibration = calibrate(shared_model(name), tmp_path)
    count, step = 100, 0.02
    found = probed(calibration, 0, count)
    dense, y = measure(calibration, 0, {})
    batch = calibration.batch(0)
    tokens = batch.valid.shape[1] if batch.valid is not None else 17
    (rows,) = calibration.sampled_rows(0, [batch], [tokens])
    weights = calibration.model.task.row_weights(batch.inputs)
    settings = {"temperature": 4.0, "term": calibration.model.task.term}
    for site in calibration.model.anatomy:
        for unit in every(site)[:: max(1, site.units // 4)]:
            mask = torch.ones(site.units)
            mask[unit] = 1 - step
            variant, changed = measure(calibration, 0, {site.name: mask})
            columns = measured_blocks(site, 3)
            exact = [without_shared(dense[z], variant[z], rows // tokens) / step**2 for z in columns]
            np.testing.assert_allclose(found.trajectory[site.name][unit] / count, exact, rtol=0.35)
            output = output_change(y, changed[None], weights, **settings) / weights.sum() / step**2
            assert found.output[site.name][unit] / count == pytest.approx(float(output), rel=0.35)


def test_curvature_ranks_neurons_as_ablation_does(tmp_path):
    calibration = calibrate(shared_model("bert"), tmp_path, rows=64)
    site = calibration.model.anatomy["blocks.0.neurons"]
    trajectory, output = Ablation(calibration, 0).score(site, every(site))
    found = probed(calibration, 0, 60)
    assert stats.spearmanr(found.trajectory[site.name].sum(1), trajectory.sum(1))[0] > 0.9
    assert stats.spearmanr(found.output[site.name], output)[0] > 0.9
    for column in range(2):
        assert stats.spearmanr(found.trajectory[site.name][:, column], trajectory[:, column])[0] > 0.9


def test_probes_are_numbered_so_that_work_can_be_split(tmp_path):
    calibration = calibrate(shared_model("bert"), tmp_path)
    sites = list(calibration.model.anatomy)
    whole = curvature(calibration, 0, sites, range(3), sketched=2)
    parts = [curvature(calibration, 0, sites, range(a, b), sketched=2) for a, b in ((0, 1), (1, 3))]
    for site in sites:
        for kind in ("trajectory", "output"):
            total = sum(getattr(part, kind)[site.name] for part in parts)
            np.testing.assert_allclose(getattr(whole, kind)[site.name], total, rtol=1e-4)
            rows = [getattr(part, f"{kind}_rows")[site.name] for part in parts]
            np.testing.assert_allclose(
                getattr(whole, f"{kind}_rows")[site.name], np.concatenate(rows), rtol=1e-3, atol=1e-7
            )


def test_kept_gradients_square_to_the_scores(tmp_path):
    calibration = calibrate(shared_model("bert"), tmp_path)
    found = curvature(calibration, 0, list(calibration.model.anatomy), range(40), sketched=40)
    for site in calibration.model.anatomy:
        squares = np.square(found.output_rows[site.name]).sum(0)
        np.testing.assert_allclose(squares, found.output[site.name], rtol=1e-4)
        # the features' gradients are summed before they are squared: equal on average only
        squares = np.square(found.trajectory_rows[site.name]).sum(0)
        assert np.median(squares / found.trajectory[site.name].sum(1)) == pytest.approx(1, abs=0.15)


def test_no_gradient_ever_reaches_a_weight(tmp_path):
    calibration = calibrate(shared_model("bert"), tmp_path)
    probed(calibration, 0, 2)
    assert all(not p.requires_grad and p.grad is None for p in calibration.model.module.parameters())


def test_the_model_is_left_as_it_was(tmp_path):
    model = shared_model("mpnet")
    calibration = calibrate(model, tmp_path)
    inputs = calibration.batch(0).inputs
    with torch.inference_mode():
        before = model.output(inputs)
        for reduced in (False, True):
            site = model.anatomy["blocks.1.neurons"]
            Ablation(calibration, 0, reduced).score(site, every(site))
    probed(calibration, 0, 1)
    with torch.inference_mode():
        assert torch.equal(model.output(inputs), before)


def test_sampled_rows_are_real_tokens_however_the_batch_is_cut(tmp_path):
    calibration = calibrate(shared_model("bert"), tmp_path, rows=20)
    batch = calibration.batch(1)
    (rows,) = calibration.sampled_rows(1, [batch], [batch.valid.shape[1]])
    assert batch.valid.flatten()[rows].all()
    assert len(rows) == 20 == len(set(rows.tolist()))
    pieces = batch.split(0)
    assert len(pieces) > 1
    cut = calibration.sampled_rows(1, pieces, [piece.valid.shape[1] for piece in pieces])
    ids = [p.inputs["input_ids"].flatten()[r] for p, r in zip(pieces, cut, strict=True)]
    assert torch.equal(torch.cat(ids), batch.inputs["input_ids"].flatten()[rows])


def test_features_of_one_length_share_their_rows_and_others_have_their_own(tmp_path):
    calibration = calibrate(shared_model("swin"), tmp_path, rows=20)
    batch = calibration.batch(0)
    features = {}
    with torch.inference_mode(), block_outputs(calibration.model, features):
        calibration.model.output(batch.inputs)
    lengths = {z: [feature.shape[1]] for z, feature in features.items()}
    assert lengths == {0: [64], 1: [64], 2: [16], 3: [16], 4: [16]}
    rows = calibration.feature_rows(0, [batch], lengths)
    (first,) = calibration.sampled_rows(0, [batch], [64])
    assert torch.equal(rows[0][0], first)
    assert torch.equal(rows[1][0], first)
    assert all(torch.equal(rows[z][0], rows[2][0]) for z in (3, 4))
    assert len(rows[2][0]) == 20
    assert int(rows[2][0].max()) < len(batch) * 16


def test_padding_does_not_enter_the_scores(tmp_path):
    """The same texts, padded further, score the same."""
    calibration = calibrate(shared_model("bert"), tmp_path, rows=10_000)
    site = calibration.model.anatomy["blocks.1.heads"]
    plain = Ablation(calibration, 0).score(site, every(site))
    processor = calibration.batches.processor
    pad = processor.pad

    class Longer:
        def __getattr__(self, name):
            return getattr(processor, name)

        def pad(self, rows):
            inputs = pad(rows)
            return {k: torch.nn.functional.pad(v, (0, 7)) for k, v in inputs.items()}

    calibration.batches.processor = Longer()
    for one, two in zip(plain, Ablation(calibration, 0).score(site, every(site)), strict=True):
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
        lambda: probed(calibration, 1, 1),
    ):
        with pytest.raises(InputError, match=r"block 1 .* batch 1"):
            run()


def test_a_model_in_training_mode_is_refused(tmp_path):
    calibration = calibrate(shared_model("bert"), tmp_path)
    model = calibration.model
    model.module.train()
    try:
        with pytest.raises(InputError, match="training mode"):
            Calibration(model, calibration.batches, 8, 4.0, 0)
    finally:
        model.module.eval()
