"""`--feature-weights`: which blocks' features count in a score, recombined without scoring."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.artefacts import tiny_ranking

from optin_cli.artefacts.ranking import Ranking
from optin_cli.errors import UsageError
from optin_cli.importance import combine
from optin_cli.selection.problem import pose
from optin_cli.selection.select import select
from optin_cli.selection.settings import Request


def ranking(**changes) -> Ranking:
    made = tiny_ranking(blocks=4, neurons=20)
    made.settings = {"output_weight": 0.5, "recombines": True, **changes}
    for site in made.sites:
        site.score = combine(made.sites, 0.5)[site.name]
    return made


def scores_with(weights, **request) -> list[np.ndarray]:
    return pose(ranking(), Request(flops=0.5, feature_weights=weights, **request)).scores


def test_a_weight_counts_its_blocks_column():
    found = scores_with((0.0, 0.0, 3.0, 0.0), output_weight=0.0)
    for site, scores in zip(ranking().sites, found, strict=True):
        if 2 in site.columns:
            assert scores == pytest.approx(3 * site.trajectory[:, site.columns.index(2)])
        else:
            assert not scores.any()


@pytest.mark.parametrize(
    ("name", "weights"),
    [("sum", (1, 1, 1, 1)), ("deep", (0.25, 0.5, 0.75, 1)), ("last", (0, 0, 0, 1))],
)
def test_names_stand_for_weights(name, weights):
    for named, listed in zip(scores_with(name), scores_with(weights), strict=True):
        assert named == pytest.approx(listed)


@pytest.mark.parametrize(("name", "power"), [("fourth-root", 0.25), ("root", 0.5), ("mean", 1.0)])
def test_sums_over_the_number_of_features(name, power):
    for site, scores in zip(ranking().sites, scores_with(name, output_weight=0.0), strict=True):
        assert scores == pytest.approx(site.trajectory.sum(1) / len(site.columns) ** power)


def test_the_rankings_own_lambda_is_used_unless_another_is_asked_for():
    made = ranking()
    expected = combine(made.sites, 0.5, [0, 0, 0, 1])
    for site, scores in zip(made.sites, scores_with("last"), strict=True):
        assert scores == pytest.approx(expected[site.name])
    assert scores_with("sum")[0] == pytest.approx(made.sites[0].score)
    expected = combine(made.sites, 2.0, [0, 0, 0, 1])
    for site, scores in zip(made.sites, scores_with("last", output_weight=2.0), strict=True):
        assert scores == pytest.approx(expected[site.name])


def test_the_rankings_own_weights_are_used_unless_others_are_asked_for():
    made = ranking(feature_weights="mean")
    found = pose(made, Request(flops=0.5, output_weight=2.0)).scores
    expected = combine(made.sites, 2.0, "mean")
    for site, scores in zip(made.sites, found, strict=True):
        assert scores == pytest.approx(expected[site.name])


def test_the_mask_records_them_and_changes():
    plain = select(ranking(), Request(flops=0.5))
    mask = select(ranking(), Request(flops=0.5, feature_weights=(0.0, 0.0, 0.0, 1.0)))
    assert mask.keep != plain.keep
    assert plain.budget["feature_weights"] == "sum"
    assert list(mask.budget["feature_weights"]) == [0, 0, 0, 1]
    named = select(ranking(), Request(flops=0.5, feature_weights="last"))
    assert (named.budget["feature_weights"], named.keep) == ("last", mask.keep)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ((1.0, 1.0), "2 weights for 4 blocks"),
        ((1.0, -1.0, 1.0, 1.0), "0 or more"),
        ((0.0, 0.0, 0.0, 0.0), "not all 0"),
        ((float("nan"), 1.0, 1.0, 1.0), "0 or more"),
        ("shallow", "auto, sum, fourth-root, root, mean, deep, last"),
    ],
)
def test_wrong_weights(weights, words):
    with pytest.raises(UsageError, match=words):
        select(ranking(), Request(flops=0.5, feature_weights=weights))


def test_rankings_without_parts_are_refused():
    bare = ranking()
    for site in bare.sites:
        site.columns, site.trajectory = [], np.zeros((site.units, 0))
    for made in (bare, ranking(recombines=False)):
        for weights in ("sum", (1.0, 1.0, 1.0, 1.0)):
            with pytest.raises(UsageError, match="leave feature_weights out"):
                select(made, Request(flops=0.5, feature_weights=weights))
        with pytest.raises(UsageError, match="leave output_weight out"):
            select(made, Request(flops=0.5, output_weight=1.0))


# ---- by the budget ----


def automatic(**changes) -> Ranking:
    """A ranking as `score` writes it when nobody says how its parts count."""
    made = ranking(feature_weights="auto", output_weight=None, **changes)
    for site in made.sites:
        site.score = combine(made.sites, 0.3, "fourth-root")[site.name]
    return made


@pytest.mark.parametrize(
    ("flops", "features", "weight"),
    [
        (0.9, "fourth-root", 0.3),
        (0.35, "fourth-root", 0.3),
        (0.34, "root", 0.1),
        (0.1, "root", 0.1),
    ],
)
def test_the_budget_decides_where_nobody_says_how_parts_count(flops, features, weight):
    made = automatic()
    mask = select(made, flops)
    assert (mask.budget["feature_weights"], mask.budget["output_weight"]) == (features, weight)
    said = select(made, Request(flops=flops, feature_weights=features, output_weight=weight))
    assert mask.keep == said.keep
    expected = combine(made.sites, weight, features)
    for site, scores in zip(made.sites, pose(made, Request(flops=flops)).scores, strict=True):
        assert scores == pytest.approx(expected[site.name])


@pytest.mark.parametrize("flops", [0.9, 0.4, 0.2])
def test_channels_count_by_the_root_at_every_budget(flops):
    made = automatic()
    for site in made.sites:
        site.kind = "channels"
    expected = combine(made.sites, 0.1, "root")
    for site in made.sites:
        site.score = expected[site.name]
    problem = pose(made, Request(flops=flops))
    assert problem.weighting == ("root", 0.1)
    for site, scores in zip(made.sites, problem.scores, strict=True):
        assert scores == pytest.approx(expected[site.name])


def test_the_tightest_budget_decides():
    for share, features in ((0.5, "fourth-root"), (0.2, "root")):
        made = automatic()
        in_sites = sum(site.units * site.params_per_unit for site in made.sites)
        made.dense = {**made.dense, "params": 2 * in_sites, "site_params": in_sites}
        problem = pose(made, Request(flops=0.9, params=0.5 + share / 2))
        assert problem.share == pytest.approx(share)
        assert problem.weighting[0] == features


def test_what_is_left_of_the_ranked_model_counts_not_of_the_dense_one():
    made = automatic()
    made.dense = {**made.dense, "macs_per_token": 4 * made.dense["macs_per_token"]}
    made.dense["macs_per_pair"] = 4 * made.dense["macs_per_pair"]
    problem = pose(made, Request(flops=0.2))
    assert problem.share == pytest.approx(0.8)
    assert problem.weighting == ("fourth-root", 0.3)


def test_half_a_word_leaves_the_other_half_to_the_budget():
    made = automatic()
    assert pose(made, Request(flops=0.2, output_weight=2.0)).weighting == ("root", 2.0)
    assert pose(made, Request(flops=0.2, feature_weights="auto")).weighting == ("root", 0.1)
    assert pose(made, Request(flops=0.2, feature_weights="sum")).weighting == ("sum", 0.3)


def test_auto_can_be_asked_of_any_ranking_with_parts():
    """A ranking scored with a lambda keeps it, unless all is left to the budget."""
    scored = automatic()
    scored.settings["output_weight"] = 1.0
    assert pose(scored, Request(flops=0.2)).weighting == ("root", 1.0)
    assert pose(scored, Request(flops=0.2, feature_weights="auto")).weighting == ("root", 0.1)
    old = ranking(feature_weights="root")
    assert pose(old, Request(flops=0.9)).weighting == ("root", 0.5)
    assert pose(old, Request(flops=0.9, feature_weights="auto")).weighting == ("fourth-root", 0.3)


def test_a_ranking_from_before_tasks_counted_is_combined_anew_for_one_that_writes():
    """Oracle: the parts combined by hand with the weight of such a task."""
    made = tiny_ranking(blocks=3, heads=3, neurons=5, seed=1)
    made.model["task"] = "language-modeling"
    made.settings.update(feature_weights="auto", output_weight=None)
    for old in (True, False):
        weights = ("fourth-root", 0.3 if old else 30.0)
        made.settings.pop("weighting", None) if old else made.settings.update(weighting=list(weights))
        for name, scores in combine(made.sites, weights[1], weights[0]).items():
            next(site for site in made.sites if site.name == name).score = scores
        expected = combine(made.sites, 30.0, "fourth-root")
        posed = pose(made, Request(flops=0.9))
        assert posed.weighting == ("fourth-root", 30.0)
        for site, scores in zip(posed.sites, posed.scores, strict=True):
            np.testing.assert_allclose(scores, expected[site.name])
