"""Rankings on disk: round trips, bytes, digests."""

from __future__ import annotations

import dataclasses
import time

import h5py
import numpy as np
import pytest
from helpers.artefacts import CALIBRATION, tiny_ranking
from helpers.rankings import as_plain, facts, ranked_sites, refused, resealed, words
from helpers.runs import examples
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from optin_cli.artefacts.ranking import (
    Ranking,
    read_ranking,
    read_sketch,
    write_ranking,
)
from optin_cli.artefacts.sketch import Sketch
from optin_cli.errors import ArtefactError

MODEL, DENSE = tiny_ranking().model, tiny_ranking().dense


@st.composite
def rankings(draw) -> Ranking:
    return Ranking(
        model={**draw(facts), **MODEL, "digest": draw(words)},
        data={**draw(facts), **CALIBRATION, "fingerprint": draw(words)},
        row_ids=sorted(draw(st.sets(st.integers(0, 2**40), max_size=5))),
        method=draw(words),
        settings=draw(facts),
        tokens=draw(st.floats(1, 512)),
        dense={**draw(facts), **DENSE},
        sites=[draw(ranked_sites(block)) for block in range(draw(st.integers(0, 3)))],
        batch_weights=draw(st.lists(st.floats(0, 1), max_size=3)),
        device=draw(words),
        dtype=draw(words),
        versions=draw(st.dictionaries(words, words, max_size=2)),
        created=draw(words),
        seconds=draw(st.floats(0, 1e6)),
    )


@examples(80)
@given(ranking=rankings())
def test_a_written_ranking_reads_back_bitwise_equal(tmp_path_factory, ranking):
    path = tmp_path_factory.mktemp("ranking") / "r.h5"
    write_ranking(path, ranking)
    assert as_plain(read_ranking(path)) == as_plain(ranking)


def test_sites_keep_the_order_of_the_model(tmp_path):
    """blocks.10 comes after blocks.9, not after blocks.1."""
    ranking = tiny_ranking(blocks=12)
    write_ranking(tmp_path / "r.h5", ranking)
    read = [site.name for site in read_ranking(tmp_path / "r.h5").sites]
    assert read == [site.name for site in ranking.sites] != sorted(read)


def test_the_same_ranking_gives_the_same_bytes(tmp_path):
    write_ranking(tmp_path / "a.h5", tiny_ranking())
    time.sleep(1.1)  # HDF5 can keep the second at which it wrote
    write_ranking(tmp_path / "b.h5", tiny_ranking())
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


@st.composite
def sketches(draw) -> Sketch:
    rows, sites = draw(st.integers(0, 4)), draw(st.integers(0, 2))
    values = st.floats(-1e9, 1e9, width=32)
    parts = [
        {
            f"blocks.{i}.heads": draw(
                arrays.arrays(np.float32, (rows, draw(st.integers(0, 4))), elements=values)
            )
            for i in range(count)
        }
        for count in (draw(st.sampled_from([0, sites])), sites)
    ]
    return Sketch(np.arange(rows, dtype=np.int64), *parts)


@examples(60)
@given(sketch=sketches())
def test_a_sketch_reads_back_to_half_precision(tmp_path_factory, sketch):
    path = tmp_path_factory.mktemp("sketch") / "r.h5"
    write_ranking(path, tiny_ranking(), sketch)
    found = read_sketch(path)
    np.testing.assert_array_equal(found.examples, sketch.examples)
    for part in ("trajectory", "output"):
        one, two = getattr(sketch, part), getattr(found, part)
        assert set(one) == set(two)
        for name, array in one.items():
            scale = np.abs(array).max(initial=0)
            np.testing.assert_allclose(two[name], array, rtol=1e-3, atol=1e-7 * scale)
    assert as_plain(read_ranking(path)) == as_plain(tiny_ranking())


def test_a_ranking_may_have_no_sketch(path):
    assert read_sketch(path) is None


def test_a_damaged_sketch_is_refused(path):
    values = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    write_ranking(path, tiny_ranking(), Sketch(np.arange(8), {}, {"blocks.0.heads": values}))
    with h5py.File(path, "r+") as file:
        file["sketch/output/blocks.0.heads"][0, 0] = 0.25
    assert read_ranking(resealed(path)).sites  # the scores are as they were
    with pytest.raises(ArtefactError, match="damaged"):
        read_sketch(path)


@pytest.mark.parametrize("version", [1, 99])
def test_another_schema_is_refused(path, version):
    with h5py.File(path, "r+") as file:
        file.attrs["schema_version"] = version
    assert "schema version" in refused(resealed(path))


def test_the_digest_is_of_what_the_scores_are_and_came_from():
    digest = tiny_ranking().digest
    settings = {"seed": 1, "probes": 4, "lambda": 1.0}
    changes = [
        {"model": {"digest": "x"}},
        {"data": {"fingerprint": "x"}},
        {"row_ids": [1, 4, 10]},
        {"method": "ablation"},
        {"settings": settings},
        {"tokens": 12.0},
        {"seed": 1},
    ]
    digests = [tiny_ranking(**change).digest for change in changes]
    assert len({digest, *digests}) == 1 + len(changes)


def test_the_digest_is_not_of_when_and_how_fast():
    later = tiny_ranking(created="2030-01-01T00:00:00", seconds=99.0, versions={"optin": "9"})
    assert later.digest == tiny_ranking().digest


def test_macs_are_those_of_the_sites():
    ranking = tiny_ranking()
    tokens = 10
    by_hand = sum(
        site.units * (site.macs_per_token * tokens + site.macs_per_pair * tokens**2) for site in ranking.sites
    )
    assert ranking.macs(tokens) == by_hand == ranking.dense_macs(tokens)
    larger = dataclasses.replace(ranking, dense={"macs_per_token": 10_000, "macs_per_pair": 7})
    assert larger.dense_macs(tokens) == 10_000 * 10 + 7 * 100
