"""What all heads of a block cost together where a norm undoes their scale: against full forwards without them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers.brute_force import calibrate, change
from helpers.families import ALL, CNNS, MORE_FAMILIES
from helpers.models import opened, saved_model, shared_model
from helpers.pruning import data_for

from optin_cli.scoring.methods.ablation import Ablation
from optin_cli.scoring.plan import make_plan
from optin_cli.scoring.score import score
from optin_cli.scoring.settings import ScoreSettings
from optin_cli.scoring.sublayers import normed_sublayers
from optin_cli.structure.anatomy import SUBLAYERS

NORMED = {"gemma2", "gemma3", "gemma3-one-group"}
ALONE = {
    "maskformer-resnet": {"blocks.5.cross_heads"}
}  # its first queries are zero: the norm reads nothing else


def planned(name: str, **settings):
    model = opened(saved_model(name))
    return make_plan(model, data_for(model), ScoreSettings(sketch_rows=0, probes=1, **settings))


@pytest.mark.parametrize("name", ALL)
def test_a_whole_sublayer_is_ablated_as_in_a_full_forward(name):
    calibration = calibrate(shared_model(name))
    anatomy = calibration.model.anatomy
    several = [site for site in anatomy if site.kind == "heads" and site.units > 1]
    whole_too = anatomy.with_sublayers({site.name for site in several})
    calibration.model = replace(calibration.model, anatomy=whole_too)
    wholes = [site for site in whole_too if site.kind == SUBLAYERS]
    assert [site.name for site in wholes] == [f"{site.name}.{SUBLAYERS}" for site in several]
    ablation = Ablation(calibration, 0)
    for whole, heads in zip(wholes, several, strict=True):
        trajectory, output = ablation.score(whole, np.array([0]))
        expected, changed = change(calibration, heads, slice(None), 0.0)
        np.testing.assert_allclose(trajectory[0], expected, rtol=1e-3, atol=1e-9)
        assert output[0] == pytest.approx(changed, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("name", [*ALL, *(name for name in MORE_FAMILIES if name not in CNNS)])
def test_a_norm_right_behind_heads_is_found_where_there_is_one(name):
    calibration = calibrate(shared_model(name))
    found = normed_sublayers(calibration.model, calibration.batch(0).head(1))
    several = {s.name for s in calibration.model.anatomy if s.kind == "heads" and s.units > 1}
    assert found == (several if name in NORMED else ALONE.get(name, set()))


@pytest.mark.parametrize("method", ["curvature", "ablation", "mixed"])
def test_rankings_hold_the_sublayers_of_heads_beside_their_units(method, tmp_path):
    plan = planned("gemma3", method=method, samples=12, batch_size=6)
    ranking = score(plan, tmp_path / "r.h5")
    heads = [site for site in ranking.sites if site.kind == "heads"]
    assert [one.site for one in ranking.sublayers] == [site.name for site in heads]
    assert {site.kind for site in ranking.sites} == {"heads", "neurons"}
    for one, site in zip(ranking.sublayers, heads, strict=True):
        assert (one.columns, one.trajectory.shape) == (site.columns, (1, len(site.columns)))
        whole = plan.calibration.model.anatomy[f"{one.site}.{SUBLAYERS}"]
        all_batches = range(len(plan.calibration))
        each = [Ablation(plan.calibration, batch).score(whole, np.array([0])) for batch in all_batches]
        weights = [plan.calibration.weight(batch) for batch in all_batches]
        for got, part in ((one.trajectory, 0), (one.output, 1)):
            expected = sum(weight * found[part] for weight, found in zip(weights, each, strict=True))
            np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_curvature_takes_as_few_batches_for_them_as_hold_sixteen_examples(tmp_path):
    """Oracle: the mean over those batches, by their examples."""
    plan = planned("gemma3", samples=46, batch_size=6)
    batches = plan.calibration.batches
    method = plan.method(plan.calibration, plan.settings)
    wholes = [site.name for site in method.wholes]
    measured = sorted({item.batch for item in method.items() if item.site in wholes})
    middle = len(batches) // 2
    assert measured == [middle - 1, middle, middle + 1]
    ranking = score(plan, tmp_path / "r.h5")
    whole = plan.calibration.model.anatomy[wholes[0]]
    found = [Ablation(plan.calibration, batch).score(whole, np.array([0])) for batch in measured]
    sizes = np.array([len(batches.ids(batch)) for batch in measured])
    for part in (0, 1):
        expected = sum(one[part] * size for one, size in zip(found, sizes, strict=True)) / sizes.sum()
        measured_part = (ranking.sublayers[0].trajectory, ranking.sublayers[0].output)[part]
        np.testing.assert_allclose(measured_part, expected, rtol=1e-5)


@pytest.mark.parametrize("method", ["magnitude", "flap", "fisher"])
def test_other_methods_measure_units_alone(method, tmp_path):
    assert not score(planned("gemma3", method=method, samples=12, batch_size=6), tmp_path / "r.h5").sublayers


def test_a_ranking_without_them_is_made_again():
    assert planned("gemma3", samples=12, batch_size=6).identity()["sublayers"] is True
    assert "sublayers" not in planned("bert", samples=12, batch_size=6).identity()
