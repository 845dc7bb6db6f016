"""The parts of scores combine as the equation says."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from helpers.artefacts import tiny_ranking
from helpers.rankings import as_plain, ranked_sites
from helpers.runs import examples
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from optin_cli.artefacts.ranking import RankedSite
from optin_cli.importance import auto_weighting, combine, output_scale
from optin_cli.tasks.audio import SPEECH
from optin_cli.tasks.language import LANGUAGE
from optin_cli.tasks.registry import TASKS
from optin_cli.tasks.seq2seq import SEQ2SEQ


def brute_force(sites: list[RankedSite], weight: float) -> dict[str, list[float]]:
    """Equation 1 of OPTIN, one unit at a time."""
    sums = {s.name: [float(sum(row)) for row in s.trajectory] for s in sites}
    outputs = {s.name: [float(x) for x in s.output] for s in sites}
    everything = [x for values in sums.values() for x in values], [x for v in outputs.values() for x in v]
    medians = [float(np.median(values)) for values in everything] if everything[0] else [0.0, 0.0]
    scale = medians[0] / medians[1] if medians[1] > 0 else 0.0
    return {
        name: [t + weight * scale * o for t, o in zip(sums[name], outputs[name], strict=True)]
        for name in sums
    }


positive = st.floats(1e-6, 1e6)


@st.composite
def scored_sites(draw) -> list[RankedSite]:
    sites = []
    for block in range(draw(st.integers(1, 3))):
        site = draw(ranked_sites(block))
        shape = site.trajectory.shape
        trajectory = draw(arrays.arrays(np.float64, shape, elements=positive))
        output = draw(arrays.arrays(np.float64, site.units, elements=positive))
        sites.append(dataclasses.replace(site, trajectory=trajectory, output=output))
    return sites


@examples(150)
@given(sites=scored_sites(), weight=st.floats(0, 10))
def test_combined_scores_are_those_of_the_equation(sites, weight):
    combined = combine(sites, weight)
    expected = brute_force(sites, weight)
    assert combined.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(combined[name], expected[name], rtol=1e-12)


@examples(100)
@given(sites=scored_sites(), weight=st.floats(0.01, 10))
def test_the_weight_is_the_ratio_of_the_medians_of_both_terms(sites, weight):
    units = sum(site.units for site in sites)
    if units == 0:
        return
    trajectory = np.concatenate([s.trajectory.sum(axis=1) for s in sites])
    combined = combine(sites, weight)
    output_term = np.concatenate([combined[s.name] for s in sites]) - trajectory
    assert np.median(output_term) == pytest.approx(weight * np.median(trajectory), rel=1e-6)


@examples(100)
@given(sites=scored_sites(), factor=st.floats(1e-3, 1e3))
def test_the_unit_of_the_output_term_does_not_matter(sites, factor):
    scaled = [dataclasses.replace(site, output=site.output * factor) for site in sites]
    for name, scores in combine(sites, 1.0).items():
        np.testing.assert_allclose(combine(scaled, 1.0)[name], scores, rtol=1e-9)


def test_one_scale_holds_for_the_whole_model():
    """A scale for each site would make blocks that hardly matter as important as those that do."""
    sites = tiny_ranking().sites
    combined = combine(sites, 1.0)
    scales = [(combined[s.name] - s.trajectory.sum(axis=1)) / s.output for s in sites]
    np.testing.assert_allclose(np.concatenate(scales), output_scale(sites), rtol=1e-9)


def test_without_weight_only_the_trajectory_counts():
    for site, scores in zip(tiny_ranking().sites, combine(tiny_ranking().sites, 0).values(), strict=True):
        np.testing.assert_array_equal(scores, site.trajectory.sum(axis=1))


def test_an_output_term_that_is_mostly_zero_is_left_out():
    sites = tiny_ranking().sites
    for site in sites:
        site.output[1:] = 0
    for name, scores in combine(sites, 1.0).items():
        assert np.isfinite(scores).all()
        np.testing.assert_array_equal(scores, combine(sites, 0)[name])


def test_nothing_combines_to_nothing():
    assert combine([], 1.0) == {}


def test_combining_changes_no_stored_part():
    ranking = tiny_ranking()
    before = as_plain(ranking)
    combine(ranking.sites, 2.0)
    assert as_plain(ranking) == before


@pytest.mark.parametrize("share", [1.0, 0.2])
def test_the_output_weighs_more_where_it_says_which_token_follows(share):
    weights = {task: auto_weighting({"heads", "neurons"}, task, share) for task in TASKS}
    usual = ("fourth-root", 0.3) if share == 1.0 else ("root", 0.1)
    for task, (features, output_weight) in weights.items():
        assert features == usual[0]
        assert output_weight == (30.0 if task in (LANGUAGE, SEQ2SEQ, SPEECH) else usual[1])
