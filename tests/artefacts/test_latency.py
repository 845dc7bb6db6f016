"""Latency tables on disk, and what they predict."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.artefacts import latency_table
from helpers.models import shared_model
from helpers.runs import examples
from hypothesis import given
from hypothesis import strategies as st

from optin_cli.artefacts.latency import LatencyTable, read_latency_table, write_latency_table
from optin_cli.errors import ArtefactError, UsageError


@pytest.fixture
def path(tmp_path) -> Path:
    """A good table on disk."""
    write_latency_table(tmp_path / "t.json", latency_table(shared_model("bert").anatomy))
    return tmp_path / "t.json"


def change(path: Path, edit: Callable[[dict], Any]) -> Path:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))
    return path


def refused(path: Path) -> str:
    with pytest.raises(ArtefactError) as caught:
        read_latency_table(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_written_table_reads_back_the_same(path):
    made = latency_table(shared_model("bert").anatomy)
    assert read_latency_table(path) == made
    assert read_latency_table(path).digest == made.digest


def test_the_times_of_a_curve_stand_on_one_line(path):
    table = latency_table(shared_model("bert").anatomy)
    lines = [line.strip() for line in path.read_text().splitlines()]
    assert f'"counts": {json.dumps(table.curves[0]["counts"])},' in lines


@pytest.mark.parametrize("field", dataclasses.fields(LatencyTable), ids=lambda field: field.name)
def test_the_digest_covers_every_field(field):
    table = latency_table(shared_model("bert").anatomy)
    other = {"dict": {"x": 0}, "list": [0], "float": -1.0, "str": "x"}[
        type(getattr(table, field.name)).__name__
    ]
    assert dataclasses.replace(table, **{field.name: other}).digest != table.digest


@examples(50)
@given(st.lists(st.floats(0, 100), min_size=2, max_size=6), st.lists(st.integers(0, 50), max_size=6))
def test_times_between_measured_sizes_lie_on_the_line(ms, counts):
    table = latency_table(shared_model("bert").anatomy)
    table.curves[0] = {"counts": [10 * i for i in range(len(ms))], "ms": ms, "noise": 0.0}
    name = next(iter(table.sites))
    for count, found in zip(counts, table.site_ms(name, counts), strict=True):
        left = min(count // 10, len(ms) - 2)
        share = min((count - 10 * left) / 10, 1)
        assert found == pytest.approx(ms[left] + share * (ms[left + 1] - ms[left]))


def test_a_model_takes_its_sites_and_the_rest():
    table = latency_table(shared_model("bert").anatomy)
    kept = {name: site["units"] // 2 for name, site in table.sites.items()}
    total = table.fixed_ms + sum(float(np.sum(table.site_ms(n, [k]))) for n, k in kept.items())
    assert table.model_ms(kept) == pytest.approx(total)
    assert table.fixed_ms < table.model_ms(kept) < table.total_ms


GRID = {"ranks": [4, 8], "counts": [0, 4], "ms": [[0.0, 1.0], [0.0, 2.0]]}


@examples(50)
@given(st.integers(0, 4), st.integers(1, 12))
def test_times_between_measured_ranks_lie_on_the_line(heads, rank):
    """Below the least rank nothing is faster; from the last one on the heads are whole."""
    table = latency_table(shared_model("bert").anatomy)
    table.curves[0] |= {"ranks": GRID, "counts": [0, 4], "ms": [0.0, 2.0]}
    name = next(iter(table.sites))
    share = min(max((rank - 4) / 4, 0), 1)
    assert float(table.site_ms(name, [heads], rank)[0]) == pytest.approx(heads / 4 * (1 + share))
    assert table.model_ms({name: heads}, {name: rank}) == pytest.approx(
        table.fixed_ms + heads / 4 * (1 + share)
    )
    assert float(table.site_ms(name, [heads])[0]) == pytest.approx(heads / 2)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda d: d["curves"][0].update(counts=[1, 2, 3, 4, 5]), "ascend from 0"),
        (lambda d: d["curves"][0].update(counts=[0, 2, 1, 3, 4]), "ascend from 0"),
        (lambda d: d["curves"][0].update(counts=[0, 1.5, 2, 3, 4]), "ascend from 0"),
        (lambda d: d["curves"][0].update(counts=[0, 1]), "a time for each count"),
        (lambda d: d["curves"][0].update(counts=[], ms=[]), "a time for each count"),
        (lambda d: d["curves"][0].pop("ms"), "a time for each count"),
        (lambda d: d["curves"].__setitem__(0, 3), "a time for each count"),
        (lambda d: d["curves"][0]["ms"].__setitem__(1, None), "finite"),
        (lambda d: d["curves"][0]["ms"].__setitem__(1, float("nan")), "finite"),
        (lambda d: d["curves"][0].update(ranks=3), "times of ranks"),
        (lambda d: d["curves"][0].update(ranks={**GRID, "ranks": [8, 4]}), "times of ranks"),
        (lambda d: d["curves"][0].update(ranks={**GRID, "counts": [1, 2]}), "times of ranks"),
        (lambda d: d["curves"][0].update(ranks={**GRID, "ms": [[0.0, 1.0]]}), "times of ranks"),
        (lambda d: d["curves"][0].update(ranks={**GRID, "ms": [[0.0], [0.0]]}), "times of ranks"),
        (lambda d: d["curves"][0].update(ranks={**GRID, "ms": [[0.0, None], [0.0, 1.0]]}), "times of ranks"),
        (lambda d: d.update(fixed_ms=float("inf")), "finite"),
        (lambda d: d.update(fixed_ms=10**30 * 10**300), "finite"),
        (lambda d: d["curves"][0]["ms"].__setitem__(1, 10**400), "finite"),
        (lambda d: d["curves"][0]["counts"].__setitem__(-1, 10**30), "ascend from 0"),
        (lambda d: d.update(total_ms="fast"), "total_ms must be a number"),
        (lambda d: d.pop("sites"), "sites is missing"),
        (lambda d: d["sites"]["blocks.0.heads"].update(curve=99), "blocks.0.heads has no curve"),
        (lambda d: d["sites"]["blocks.0.heads"].pop("curve"), "blocks.0.heads has no curve"),
        (lambda d: d["sites"].update({"blocks.0.heads": 3}), "blocks.0.heads has no curve"),
        (lambda d: d["sites"]["blocks.0.heads"].update(units="all"), "no number of units"),
        (lambda d: d["setting"].pop("dtype"), "setting.dtype is missing"),
        (lambda d: d["model"].pop("dense_digest"), "model.dense_digest is missing"),
        (lambda d: d.update(format="optin-mask"), "optin bench MODEL --table"),
        (lambda d: d.update(schema_version=2), "update optin"),
    ],
)
def test_damage_is_refused_saying_what_is_wrong(path, edit, says):
    assert says in refused(change(path, edit))


def test_a_table_cut_at_any_byte_is_refused(path):
    content = path.read_bytes()
    for length in range(0, len(content) - 2, 7):
        path.write_bytes(content[:length])
        refused(path)


def test_a_missing_table_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        read_latency_table(tmp_path / "no.json")
