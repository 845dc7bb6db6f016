"""Blocks whose features share a backward pass: the sum of their own passes, fewer of them, and recorded."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.brute_force import calibrate
from helpers.data import tiny_text_csv
from helpers.families import ALL, MORE_FAMILIES
from helpers.models import shared_model

from optin_cli.data.sources import DataSpec
from optin_cli.errors import UsageError
from optin_cli.scoring.methods.curvature import CurvatureMethod, curvature
from optin_cli.scoring.methods.registry import configured
from optin_cli.scoring.plan import Plan, make_plan
from optin_cli.scoring.score import score
from optin_cli.scoring.settings import ScoreSettings


def plan_for(folder, **settings) -> Plan:
    asked = ScoreSettings(samples=12, batch_size=6, **settings)
    return make_plan(shared_model("bert"), DataSpec(str(tiny_text_csv(folder, pairs=False))), asked)


@pytest.mark.parametrize("name", [*ALL, *MORE_FAMILIES, "mask2former-swin"])
def test_blocks_that_share_a_pass_add_up_to_those_with_one_each(name):
    """Oracle: the same signs, block by block. The gradients add up before they are squared."""
    joint_is_the_sum(name)


@pytest.mark.parametrize("name", ["timm-vgg", "whisper"])
def test_where_a_feature_is_what_the_next_consumer_reads_and_where_streams_meet(name):
    """In a chain of convolutions a feature depends on units of the block behind it, by what that reads."""
    joint_is_the_sum(name)


def joint_is_the_sum(name):
    calibration = calibrate(shared_model(name))
    sites = list(calibration.model.anatomy)
    depth = len(calibration.model.anatomy.blocks)
    each = curvature(calibration, 0, sites, range(3), sketched=3)
    joint = curvature(calibration, 0, sites, range(3), sketched=3, passes=[tuple(range(depth))])
    for site in sites:
        rows, whole = each.trajectory_rows[site.name], joint.trajectory_rows[site.name]
        size = np.abs(rows).max()
        np.testing.assert_allclose(whole, rows, rtol=1e-3, atol=1e-4 * size + 1e-9)
        squares = np.square(rows.astype(np.float64)).sum(0)
        found = joint.trajectory[site.name]
        np.testing.assert_allclose(found.sum(1), squares, rtol=2e-3, atol=1e-4 * squares.max() + 1e-12)
        assert np.ptp(found, axis=1).max(initial=0) <= 1e-6 * found.max(initial=0)  # shared alike
        np.testing.assert_allclose(joint.output[site.name], each.output[site.name], rtol=1e-4)


def test_a_block_with_a_pass_of_its_own_keeps_its_column():
    calibration = calibrate(shared_model("bert"))
    sites = list(calibration.model.anatomy)
    each, both = (curvature(calibration, 0, sites, range(2), passes=p) for p in (None, [(0, 1), (2,)]))
    for site in sites:
        one, other = each.trajectory[site.name], both.trajectory[site.name]
        np.testing.assert_allclose(other[:, -1], one[:, -1], rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize(
    ("asked", "depth", "expected"),
    [
        (None, 3, None),
        (None, 10, None),
        (None, 11, 3),
        (None, 48, 3),
        (1, 3, 1),
        (3, 3, None),
        (40, 3, None),
        (4, 24, 4),
    ],
)
def test_deep_models_have_strata_by_default(asked, depth, expected):
    assert CurvatureMethod.shared_passes(asked, depth) == expected


def test_a_ranking_says_how_its_passes_were_shared(tmp_path):
    """One that shares none is that of before strata existed; one of the same strata is reused."""
    each, joint = plan_for(tmp_path), plan_for(tmp_path, strata=1)
    assert "strata" not in each.identity() and plan_for(tmp_path, strata=3).identity() == each.identity()
    assert joint.identity()["strata"] == 1
    own, shared = score(each, tmp_path / "own.h5"), score(joint, tmp_path / "joint.h5")
    for one, other in zip(own.sites, shared.sites, strict=True):
        assert one.columns == other.columns
        assert np.ptp(other.trajectory, axis=1).max() <= 1e-6 * other.trajectory.max()
        # the same units lead: means of few probes
        assert one.trajectory.sum() == pytest.approx(other.trajectory.sum(), rel=0.5)


def test_methods_without_backward_passes_from_features_have_no_strata():
    with pytest.raises(
        UsageError, match="joins backward passes of curvature, and method='ablation' has none"
    ):
        configured(ScoreSettings(method="ablation", strata=2))
