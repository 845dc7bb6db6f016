"""Rankings on disk: what is written is read, what is damaged is refused; and scores from their parts."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers.artefacts import tiny_ranking
from helpers.runs import examples
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from optin_cli.artefacts.ranking import (
    RankedSite,
    Ranking,
    combine,
    output_scale,
    read_ranking,
    read_sketch,
    write_ranking,
)
from optin_cli.artefacts.sketch import Sketch
from optin_cli.errors import ArtefactError, UsageError

ARRAYS = ("score", "trajectory", "output", "by_batch")


def as_plain(ranking: Ranking) -> dict:
    """Every field, with arrays as shape, dtype and bytes: equal only if bitwise equal."""
    plain = dataclasses.asdict(ranking)
    for site in plain["sites"]:
        for name in ARRAYS:
            site[name] = (site[name].shape, str(site[name].dtype), site[name].tobytes())
    return plain


@pytest.fixture
def path(tmp_path) -> Path:
    """A good ranking on disk."""
    write_ranking(tmp_path / "good.h5", tiny_ranking())
    return tmp_path / "good.h5"


# round trip

finite = st.floats(allow_nan=False, allow_infinity=False)
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
plain = (
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | finite
    | words
    | st.lists(st.integers(), max_size=3)
)
facts = st.dictionaries(words, plain, max_size=3)


@st.composite
def ranked_sites(draw, block: int) -> RankedSite:
    units, columns = draw(st.integers(0, 5)), draw(st.integers(1, 3))
    kind = draw(st.sampled_from(["heads", "neurons"]))
    sizes = [draw(st.integers(0, 2**40)) for _ in range(3)]
    return RankedSite(
        f"blocks.{block}.{kind}",
        kind,
        block,
        units,
        draw(st.integers(1, 128)),
        *sizes,
        score=draw(arrays.arrays(np.float64, units, elements=finite)),
        trajectory=draw(arrays.arrays(np.float64, (units, columns), elements=finite)),
        output=draw(arrays.arrays(np.float64, units, elements=finite)),
        columns=draw(st.lists(st.integers(0, 40), min_size=columns, max_size=columns)),
        by_batch=draw(
            arrays.arrays(
                np.float32, (draw(st.integers(0, 3)), units, 2), elements=st.floats(0, 1e6, width=32)
            )
        ),
    )


@st.composite
def rankings(draw) -> Ranking:
    return Ranking(
        model={**draw(facts), "digest": draw(words)},
        data={**draw(facts), "fingerprint": draw(words)},
        row_ids=sorted(draw(st.sets(st.integers(0, 2**40), max_size=5))),
        method=draw(words),
        settings=draw(facts),
        tokens=draw(st.floats(1, 512)),
        dense=draw(facts),
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
    assert read_ranking(path).sites  # the scores are as they were
    with pytest.raises(ArtefactError, match="damaged"):
        read_sketch(path)


@pytest.mark.parametrize("version", [1, 99])
def test_another_schema_is_refused(path, version):
    with h5py.File(path, "r+") as file:
        file.attrs["schema_version"] = version
    assert "schema version" in refused(path)


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


# damage


def refused(path: Path) -> str:
    """The message with which a file is refused as damaged or no ranking."""
    with pytest.raises(ArtefactError) as caught:
        read_ranking(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_missing_ranking_says_how_to_make_one(tmp_path):
    with pytest.raises(UsageError, match="optin score"):
        read_ranking(tmp_path / "nothing.h5")


def test_a_folder_is_no_ranking(tmp_path):
    with pytest.raises(UsageError, match=str(tmp_path)):
        read_ranking(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"\x89HDF\r\n\x1a\n", bytes(5000)])
def test_a_file_that_is_not_hdf5_is_refused(tmp_path, content):
    (tmp_path / "r.h5").write_bytes(content)
    assert "score again" in refused(tmp_path / "r.h5")


def test_an_hdf5_file_of_something_else_is_refused(tmp_path):
    with h5py.File(tmp_path / "r.h5", "w") as file:
        file["weights"] = np.zeros(3)
    assert "not a ranking" in refused(tmp_path / "r.h5")


def test_a_ranking_cut_anywhere_is_refused(tmp_path):
    good = tmp_path / "good.h5"
    write_ranking(good, tiny_ranking(blocks=1))
    content = good.read_bytes()
    cut = tmp_path / "cut.h5"
    for length in (*range(0, len(content), 7), *range(len(content) - 50, len(content))):
        cut.write_bytes(content[:length])
        with pytest.raises((ArtefactError, UsageError)):
            read_ranking(cut)


def test_a_flipped_bit_in_any_number_is_noticed(path):
    """Scores, their parts and row ids: the digest covers them all."""
    ranking, content = read_ranking(path), path.read_bytes()
    stored = [getattr(site, name).tobytes() for site in ranking.sites for name in ARRAYS]
    stored.append(np.asarray(ranking.row_ids, dtype=np.int64).tobytes())
    for data in stored:
        assert content.count(data) >= 1
        for offset in (0, len(data) // 2, len(data) - 1):
            damaged = bytearray(content)
            damaged[content.index(data) + offset] ^= 1
            path.write_bytes(damaged)
            assert "damaged" in refused(path)


def test_a_flipped_byte_anywhere_is_refused_or_changes_nothing(path):
    content = path.read_bytes()
    expected = without_circumstances(read_ranking(path))
    for position in range(0, len(content), 23):
        damaged = bytearray(content)
        damaged[position] ^= 0x11
        path.write_bytes(damaged)
        try:
            read = read_ranking(path)
        except (ArtefactError, UsageError):
            continue
        assert without_circumstances(read) == expected, f"byte {position}"


def without_circumstances(ranking: Ranking) -> dict:
    """All that a selection depends on; when, where and how fast may be wrong in a damaged file."""
    plain = as_plain(ranking)
    return {k: v for k, v in plain.items() if k not in ("created", "seconds", "device", "dtype", "versions")}


def change(path: Path, edit: Callable[[h5py.File], None]) -> Path:
    with h5py.File(path, "r+") as file:
        edit(file)
    return path


def test_an_unfinished_ranking_is_refused(path):
    def unfinished(file: h5py.File) -> None:
        file.attrs["complete"] = False

    assert "incomplete" in refused(change(path, unfinished))


def test_a_ranking_without_the_mark_of_completion_is_refused(path):
    assert "incomplete" in refused(change(path, lambda file: file.attrs.pop("complete")))


def test_a_ranking_of_a_newer_schema_asks_for_an_update(path):
    def newer(file: h5py.File) -> None:
        file.attrs["schema_version"] = 99

    message = refused(change(path, newer))
    assert "schema version 99" in message and "update optin" in message


ROOT = [
    "schema_version",
    "checksum",
    "model",
    "data",
    "settings",
    "dense",
    "versions",
    "method",
    "tokens",
    "device",
]


@pytest.mark.parametrize("name", ROOT)
def test_a_missing_attribute_is_refused(path, name):
    refused(change(path, lambda file: file.attrs.pop(name)))


@pytest.mark.parametrize("name", ["kind", "block", "units", "width", "macs_per_token", "columns"])
def test_a_missing_attribute_of_a_site_is_refused(path, name):
    refused(change(path, lambda file: file["sites/blocks.0.heads"].attrs.pop(name)))


@pytest.mark.parametrize("name", ["sites", "row_ids", *(f"sites/blocks.1.neurons/{a}" for a in ARRAYS)])
def test_missing_data_is_refused(path, name):
    def remove(file: h5py.File) -> None:
        del file[name]

    refused(change(path, remove))


def test_a_missing_site_is_refused(path):
    def remove(file: h5py.File) -> None:
        del file["sites/blocks.1.neurons"]

    assert "damaged" in refused(change(path, remove))


def replaced(name: str, value: np.ndarray) -> Callable[[h5py.File], None]:
    def edit(file: h5py.File) -> None:
        del file[name]
        file[name] = value

    return edit


def consistent(path: Path, site: str, name: str, value: np.ndarray) -> Path:
    """A ranking whose digest fits, as a faulty program might write it: one array is `value`."""
    ranking = read_ranking(path)
    setattr(next(s for s in ranking.sites if s.name == site), name, value)
    write_ranking(path, ranking)
    return path


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("units", [3, 5])
def test_a_number_of_scores_that_is_not_the_number_of_units_is_refused(path, name, units):
    shape = (units, 3) if name == "trajectory" else (units,)
    assert "blocks.0.heads" in refused(consistent(path, "blocks.0.heads", name, np.ones(shape)))


@pytest.mark.parametrize("columns", [2, 4])
def test_a_number_of_columns_that_is_not_that_of_the_features_is_refused(path, columns):
    value = np.ones((4, columns))
    assert "blocks.0.heads" in refused(consistent(path, "blocks.0.heads", "trajectory", value))


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused(path, name, bad):
    shape = {"trajectory": (4, 3), "by_batch": (2, 4, 2)}.get(name, (4,))
    value = np.ones(shape)
    value[1] = bad
    message = refused(consistent(path, "blocks.0.heads", name, value))
    assert "blocks.0.heads" in message and "finite" in message


@pytest.mark.parametrize(
    "edit",
    [
        replaced("sites", np.zeros(3)),
        replaced("sites/blocks.0.heads", np.zeros(4)),
        replaced("sites/blocks.0.heads/score", np.asarray(1.0)),
        replaced("sites/blocks.0.heads/score", np.asarray([b"a"] * 4)),
        replaced("row_ids", np.asarray(1)),
        lambda file: file.attrs.modify("model", "no JSON"),
        lambda file: file.attrs.modify("model", "[]"),
        lambda file: file.attrs.create("schema_version", "first"),
        lambda file: file.attrs.create("tokens", h5py.Empty("f8")),
        lambda file: file["sites/blocks.0.heads"].attrs.create("units", h5py.Empty("i8")),
        lambda file: file["sites/blocks.0.heads"].attrs.create("columns", "words"),
    ],
    ids=["sites", "site", "score", "text", "rows", "json", "list", "version", "empty", "units", "columns"],
)
def test_data_of_another_kind_than_expected_is_refused(path, edit):
    refused(change(path, edit))


# combining


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
