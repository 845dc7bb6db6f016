"""What merging tokens costs, against a merged forward pass and relations written out."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers.artefacts import tiny_ranking
from helpers.data import tiny_image_folder, tiny_text_csv
from helpers.models import opened, saved_model
from helpers.rankings import resealed

from optin_cli.artefacts.ranking import read_ranking, write_ranking
from optin_cli.artefacts.token_ranking import RankedTokens
from optin_cli.data.sources import DataSpec
from optin_cli.errors import ArtefactError, InputError, UsageError
from optin_cli.scoring import score as scoring
from optin_cli.scoring.estimate import estimate_seconds
from optin_cli.scoring.methods.registry import configured
from optin_cli.scoring.plan import ScoreSettings, make_plan
from optin_cli.scoring.token_merging import TokenLosses, TokenMerging, levels
from optin_cli.structure.hidden_states import hidden_of
from optin_cli.transforms.token_merging import install_merges


def plan_of(name, folder, **settings):
    data = DataSpec(str(tiny_image_folder(folder / "images")))
    settings = {"method": "curvature", "samples": 12, "batch_size": 8, "tokens": True, **settings}
    return make_plan(opened(saved_model(name)), data, ScoreSettings(**settings))


def relations(rows):
    unit = rows / rows.norm(dim=-1, keepdim=True)
    return unit @ unit.T


@torch.no_grad()
def features_and_output(model, inputs, merges):
    """Features of every block at the original positions, and logits; positions are followed one by one."""
    module = copy.deepcopy(model.module)
    merging = install_merges(module, model.anatomy, merges)
    features = []

    def look(_, __, output):
        hidden = hidden_of(output)
        if merging.source is not None and hidden.shape[1] < merging.source.shape[1]:
            hidden = torch.stack(
                [
                    torch.stack([row[i] for i in where])
                    for row, where in zip(hidden, merging.source.tolist(), strict=True)
                ]
            )
        features.append(hidden.flatten(0, 1))

    for path in model.anatomy.blocks:
        module.get_submodule(path).register_forward_hook(look)
    return features, model.task.output(module, inputs)[:, 0]


@pytest.mark.parametrize("name", ["vit", "timm-vit", "dinov2-registers", "timm-post-norm"])
def test_losses_are_those_of_a_merged_forward_pass(name, tmp_path):
    plan = plan_of(name, tmp_path, rows=100_000)
    calibration, model = plan.calibration, plan.model
    batch, counts = calibration.batch(0), TokenMerging(calibration).levels
    dense, logits = features_and_output(model, batch.inputs, [])
    for block in (0, 1):
        trajectory, output = TokenLosses(calibration, 0).score(block)
        assert trajectory.shape == (len(counts), 2 - block)
        for level, count in enumerate(counts):
            merged, changed = features_and_output(model, batch.inputs, [0] * block + [count])
            expected = [
                float((relations(merged[z]) - relations(dense[z])).square().mean())
                for z in range(block + 1, 3)
            ]
            np.testing.assert_allclose(trajectory[level], expected, rtol=1e-3)
            one, two = (torch.log_softmax(x.double() / 4, dim=-1) for x in (logits, changed))
            kl = float((one.exp() * (one - two)).sum(-1).mean())
            np.testing.assert_allclose(output[level], kl, rtol=1e-3)


def test_a_ranking_with_tokens_scores_units_as_one_without(tmp_path):
    plain = scoring.score(plan_of("vit", tmp_path, tokens=False), tmp_path / "plain.h5")
    both = scoring.score(plan_of("vit", tmp_path), tmp_path / "both.h5")
    assert [t.block for t in both.token_sites] == [0, 1] and not plain.token_sites
    for one, two in zip(plain.sites, both.sites, strict=True):
        np.testing.assert_array_equal(one.score, two.score)
    assert scoring.existing(tmp_path / "both.h5", plan_of("vit", tmp_path, tokens=False)) is not None
    with pytest.raises(UsageError, match="other settings: tokens"):
        scoring.existing(tmp_path / "plain.h5", plan_of("vit", tmp_path))


def test_batches_count_by_their_examples(tmp_path):
    ranking = scoring.score(plan_of("timm-vit", tmp_path), tmp_path / "r.h5")
    calibration = plan_of("timm-vit", tmp_path).calibration
    parts = [TokenLosses(calibration, index).score(1) for index in range(2)]
    weights = ranking.batch_weights
    expected = sum(w * output for w, (_, output) in zip(weights, parts, strict=True))
    np.testing.assert_allclose(ranking.token_sites[1].output, expected)


def test_units_of_a_merged_model_are_scored_on_whole_sequences(tmp_path):
    plan = plan_of("vit", tmp_path)
    dense = scoring.score(plan, tmp_path / "dense.h5")
    again = plan_of("vit", tmp_path)
    again.model.merging = install_merges(again.model.module, again.model.anatomy, [3, 2])
    merged = scoring.score(again, tmp_path / "merged.h5")
    assert merged.merges == [3, 2] and merged.tokens == dense.tokens
    assert merged.dense["fixed_macs"] == dense.dense["fixed_macs"]
    for one, two in zip(dense.sites, merged.sites, strict=True):
        np.testing.assert_array_equal(one.score, two.score)
    assert merged.macs(merged.tokens) == again.model.anatomy.macs(merged.tokens, merges=[3, 2])
    assert merged.macs(merged.tokens) < dense.macs(dense.tokens) == merged.dense_macs(merged.tokens)
    assert estimate_seconds(again) > 0
    for path, other in (("dense", again), ("merged", plan_of("vit", tmp_path))):  # the weights are the same
        with pytest.raises(UsageError, match="other settings: merges"):
            scoring.existing(tmp_path / f"{path}.h5", other)


def test_what_cannot_be_measured_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(UsageError, match="use curvature, ablation or mixed"):
        configured(ScoreSettings(method="fisher", tokens=True))
    data = DataSpec(str(tiny_text_csv(tmp_path)))
    with pytest.raises(InputError, match="no tokens that can be merged"):
        make_plan(opened(saved_model("bert")), data, ScoreSettings(tokens=True))


def test_counts_ascend_to_half_of_what_is_free():
    assert levels(197, 1) == [6, 12, 24, 49, 74, 98]
    assert levels(5, 1) == [1, 2]
    assert levels(2, 1) == []


def with_tokens(**changes):
    tokens = [
        RankedTokens(0, [1, 4], [1, 2], np.array([[0.1, 0.2], [1.0, 2.0]]), np.array([0.5, 0.75])),
        RankedTokens(1, [1, 4], [2], np.array([[0.1], [1.0]]), np.array([0.25, 0.5])),
    ]
    return tiny_ranking(token_sites=tokens, **changes)


def test_losses_are_stored_beside_the_units(tmp_path):
    ranking = with_tokens()
    write_ranking(tmp_path / "r.h5", ranking)
    found = read_ranking(tmp_path / "r.h5")
    assert found.digest == ranking.digest != tiny_ranking().digest
    for one, two in zip(found.token_sites, ranking.token_sites, strict=True):
        assert (one.block, one.counts, one.columns) == (two.block, two.counts, two.columns)
        np.testing.assert_array_equal(one.trajectory, two.trajectory)
        np.testing.assert_array_equal(one.output, two.output)


@pytest.mark.parametrize("part", ["trajectory", "output"])
def test_losses_that_were_changed_are_noticed(part, tmp_path):
    import h5py

    write_ranking(tmp_path / "r.h5", with_tokens())
    with h5py.File(tmp_path / "r.h5", "a") as file:
        file[f"tokens/0/{part}"][0] = 9.0
    with pytest.raises(ArtefactError, match="damaged"):
        read_ranking(resealed(tmp_path / "r.h5"))
    with h5py.File(tmp_path / "r.h5", "a") as file:
        file["tokens/0"].attrs["counts"] = [4]
    with pytest.raises(ArtefactError, match="don't fit"):
        read_ranking(resealed(tmp_path / "r.h5"))
