"""Files of every kind and schema that a version of optin has written load for ever; they are in `files/`.

Never renew one of them: a change of layout gets a new schema, and another file beside these. `mask-1` and `optin-1`
have the entries of the first commit (the family's table in it is a later one). Rankings of schema 1 are refused: their
trajectory is a sum over the blocks, which the weights of today's scores need apart.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers.cli import run
from helpers.rankings import resealed

from optin_cli.artefacts import exported, latency, mask, point, pruned, ranking
from optin_cli.artefacts.exported import read_export
from optin_cli.artefacts.latency import read_latency_table
from optin_cli.artefacts.mask import read_mask
from optin_cli.artefacts.point import read_point, read_sweep
from optin_cli.artefacts.pruned import read_checked
from optin_cli.artefacts.ranking import Ranking, read_ranking, read_sketch
from optin_cli.errors import ArtefactError
from optin_cli.selection.select import select
from optin_cli.selection.settings import Request

FILES = Path(__file__).parent / "files"
SCORES = [1.2302747766079578, 2.64953753612425, 0.6933896152562873, 0.7575706845066195]
KEPT = {"blocks.0.heads": [0, 3], "blocks.0.neurons": [1, 2, 5]}


def facts(ranking: Ranking) -> tuple[object, ...]:
    return (
        ranking.digest,
        [site.name for site in ranking.sites],
        ranking.row_ids,
        ranking.tokens,
        ranking.method,
    )


@pytest.mark.parametrize("name", ["ranking-2.h5", "ranking-2-without-digest.h5"])
def test_rankings(name):
    found = read_ranking(FILES / name)
    digest = "0a28ecaf2e4cab7116a1e4ca36cf0df3e5a2d9b219c54da4b53d4cc2a9c7e71b"
    sites = ["blocks.0.heads", "blocks.0.neurons"]
    assert facts(found) == (digest, sites, [1, 4, 9], 11.5, "curvature")
    assert [site.units for site in found.sites] == [4, 6]
    np.testing.assert_allclose(found.sites[0].score, SCORES, rtol=1e-12)
    assert len(select(found, Request(flops=0.6)).keep["blocks.0.neurons"]) <= 6


def test_a_ranking_of_the_first_schema_says_how_to_make_it_again(tmp_path):
    path = FILES / "ranking-1-without-digest.h5"
    with pytest.raises(ArtefactError, match="schema version 1") as refused:
        read_ranking(path)
    assert refused.value.hint == f"score again: optin score tiny --data some/data -o {path} --force"
    other = tmp_path / "r-without-facts.h5"
    shutil.copy(path, other)
    with h5py.File(other, "r+") as file:
        file.attrs["model"] = "[1]"
    with pytest.raises(ArtefactError, match="schema version 1") as refused:
        read_ranking(other)
    assert refused.value.hint == "score again to replace it"


def test_sketches():
    sketch = read_sketch(FILES / "ranking-2.h5")
    expected = np.arange(16).reshape(4, 4)
    np.testing.assert_allclose(sketch.output["blocks.0.heads"], expected, atol=0.01)
    assert read_sketch(FILES / "ranking-2-without-digest.h5") is None


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_masks(version):
    mask = read_mask(FILES / f"mask-{version}.json")
    assert (mask.keep, mask.units) == (KEPT, {"blocks.0.heads": 4, "blocks.0.neurons": 6})
    assert mask.budget["flops"] == 0.6 and mask.reached["macs"] == 598.0
    assert mask.merges == ([2, 0, 1] if version >= 3 else [])
    assert mask.ranks == ({"blocks.0.heads": 2} if version == 4 else {})
    assert "0.598" in run("inspect", FILES / f"mask-{version}.json").stdout


def test_latency_tables():
    table = read_latency_table(FILES / "latency-1.json")
    assert table.sites["blocks.0.heads"]["units"] == 4
    assert table.model_ms({"blocks.0.heads": 4, "blocks.0.neurons": 6}) == pytest.approx(table.total_ms)
    run("inspect", FILES / "latency-1.json")


@pytest.mark.parametrize("version", [1, 2, 3])
def test_records_of_pruned_models(tmp_path, version):
    shutil.copy(FILES / f"optin-{version}.json", tmp_path / "optin.json")
    record = read_checked(tmp_path)
    assert record.kept == KEPT and record.history[-1]["params"] == 420
    assert record.merges == ([2, 0, 1] if version > 1 else [])
    assert bool(record.resized) == (version > 2)


def test_points_of_sweeps(tmp_path):
    shutil.copy(FILES / "point-1.json", tmp_path / "flops-0.6.point.json")
    (point,) = read_sweep(tmp_path).points
    assert (point.name, point.share, point.drop, point.params) == ("flops-0.6", 0.598, 0.3, 420)
    assert point.timing(32)["speedup"] == 1.43
    assert "flops-0.6" in run("inspect", tmp_path).stdout


def test_records_of_exported_files():
    record = read_export(FILES / "export-1.json")
    assert (record.model["id"], record.files["onnx/model.onnx"]["opset"]) == ("tiny", 18)


def later(path: Path, **entries: object) -> Path:
    """The file as a later optin might write it."""
    if path.suffix == ".h5":
        with h5py.File(path, "r+") as file:
            for name, value in {"schema_version": 99, **entries}.items():
                file.attrs[name] = value if isinstance(value, int | str) else json.dumps(value)
        return path if "without" in path.name else resealed(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 99, **entries}))
    return path


@pytest.mark.parametrize("name", sorted(path.name for path in FILES.iterdir()))
def test_files_of_later_schemas_name_the_version_to_install(name, tmp_path):
    read = {"ranking": read_ranking, "mask": read_mask, "latency": read_latency_table, "point": read_point,
            "export": read_export,
            "optin": lambda path: read_checked(path.parent)}[name.split("-")[0]]  # fmt: skip

    def hint(**entries: object) -> str | None:
        path = tmp_path / ("optin.json" if name.startswith("optin") else name)
        shutil.copy(FILES / name, path)
        with pytest.raises(ArtefactError, match="schema version 99") as refused:
            read(later(path, **entries))
        return refused.value.hint

    told = "update optin: pip install -U"
    assert hint(needs_optin="0.7.0") == f"{told} 'optin>=0.7.0'"
    assert hint(versions={"optin": "0.6.1"}) == f"{told} 'optin>=0.6.1'"
    for odd in ("0.7; rm -rf", "-e .", "", "9" * 99):
        assert hint(needs_optin=odd, versions={}, history=[]) == f"{told} optin"


def test_every_kind_has_the_files_of_all_its_schemas():
    kinds = {
        "mask": mask,
        "optin": pruned,
        "latency": latency,
        "point": point,
        "export": exported,
        "ranking": ranking,
    }
    for name, module in kinds.items():
        for version in range(1, module.SCHEMA_VERSION + 1):
            assert list(FILES.glob(f"{name}-{version}[.-]*")), f"{name}-{version}"
