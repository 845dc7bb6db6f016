"""Images from folders, Parquet and the hub through the commands, broken files among them."""

from __future__ import annotations

import json
import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from helpers.cli import run
from helpers.data import tiny_image_folder
from helpers.lazy import Lazy
from helpers.models import saved_model, tiny_model
from PIL import Image

from optin_cli.artefacts.ranking import read_ranking

datasets, pyarrow, parquet = Lazy("datasets"), Lazy("pyarrow"), Lazy("pyarrow.parquet")

ROWS, BROKEN = 30, [4, 11]
FAST = ["--samples", "16", "--batch-size", "4", "--method", "curvature", "--probes", "1"]


def noisy(mode: str, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 36 + seed, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def images(broken: list[int]) -> list[bytes]:
    """Images of many modes and sizes, some of them cut."""
    contents = []
    for i in range(ROWS):
        content = BytesIO()
        noisy(("RGB", "L", "RGBA", "P", "1", "CMYK")[i % 6], i).save(content, "TIFF" if i % 6 == 5 else "PNG")
        contents.append(content.getvalue()[: 200 if i in broken else None])
    return contents


def as_folder(contents: list[bytes], path: Path) -> str:
    for i, content in enumerate(contents):
        file = path / f"class{i // 15}" / f"{i:03}.{'tiff' if i % 6 == 5 else 'png'}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return str(path)


def as_parquet(contents: list[bytes], path: Path) -> str:
    table = {
        "image": [{"bytes": content, "path": None} for content in contents],
        "label": [i // 15 for i in range(ROWS)],
    }
    path.mkdir()
    parquet.write_table(pyarrow.table(table), path / "train.parquet")
    return str(path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Stands in for the hub: `org/pictures` is a data set of ours."""

    def publish(contents: list[bytes], path: Path) -> str:
        table = {"image": [{"bytes": content, "path": "x"} for content in contents]}
        published = datasets.Dataset.from_dict({**table, "label": [i // 15 for i in range(ROWS)]})
        published = published.cast_column("image", datasets.Image())
        monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: published)
        return "org/pictures"

    return publish


@pytest.mark.parametrize("kind", [pytest.param("folder", marks=pytest.mark.slow), "parquet", "hub"])
def test_from_images_to_a_smaller_model(kind, hub, tmp_path):
    publish = {"folder": as_folder, "parquet": as_parquet, "hub": hub}[kind]
    data, model = publish(images(BROKEN), tmp_path / "data"), saved_model("timm-vit")
    ranking, mask, small = tmp_path / "r.h5", tmp_path / "m.json", tmp_path / "small"
    told = run("score", model, "--data", data, "-o", ranking, *FAST, "--samples", 28).stderr
    assert re.search(
        r"2 of 30 images of .* are broken and left out, others taken in their place: row 4 \(", told
    )
    assert read_ranking(ranking).row_ids == [i for i in range(ROWS) if i not in BROKEN]
    assert (
        "already the ranking"
        in run("score", model, "--data", data, "-o", ranking, *FAST, "--samples", 28).stderr
    )
    run("select", ranking, "--flops", 0.6, "-o", mask)
    told = run("apply", model, mask, "-o", small).stderr
    assert "broken" in told  # on more rows, looked at anew
    assert "instead" not in told  # the recorded rows could be read again
    found = json.loads(
        run("eval", small, "--baseline", model, "--data", data, "--split", "train", "--json").stdout
    )
    assert (found["examples"], found["broken"], found["main"]) == (28, 2, "top1")
    assert found["fidelity"].keys() == {"agreement", "kl"}


def test_workers_change_no_bit_of_a_ranking(tmp_path):
    data, model = as_folder(images(BROKEN), tmp_path / "data"), saved_model("timm-vit")
    digests = set()
    for workers in (0, 2):
        path = tmp_path / f"{workers}.h5"
        run("score", model, "--data", data, "-o", path, *FAST, "--workers", workers)
        digests.add(read_ranking(path).digest)
    assert len(digests) == 1
    found = [
        json.loads(
            run("eval", model, "--data", data, "--split", "train", "--workers", workers, "--json").stdout
        )
        for workers in (0, 2)
    ]
    assert found[0] == found[1]


def test_too_many_broken_images_are_a_failure_of_every_command(tmp_path):
    data, model = as_folder(images([0, 3, 9, 20]), tmp_path / "data"), saved_model("timm-vit")
    for command in (
        ["score", model, "-o", tmp_path / "r.h5"],
        ["eval", model, "--split", "train"],
        ["prune", model, "--flops", 0.5, "-o", tmp_path / "small", "--ranking", tmp_path / "r.h5"],
    ):
        told = run(*command, "--data", data, code=1).stderr
        assert "4 of 30 images" in told and "more than a tenth" in told
    assert not (tmp_path / "r.h5").exists()
    told = run("eval", model, "--data", data, "--workers", -1, code=2).stderr
    assert "--workers -1" in told


def test_a_recorded_row_that_broke_is_told_and_others_are_compensated_on(tmp_path):
    data, model = as_folder(images([]), tmp_path / "data"), saved_model("timm-vit")
    ranking, mask = tmp_path / "r.h5", tmp_path / "m.json"
    run("score", model, "--data", data, "-o", ranking, *FAST)
    run("select", ranking, "--flops", 0.6, "-o", mask)
    row = read_ranking(ranking).row_ids[0]
    [path] = Path(data).rglob(f"{row:03}.*")
    path.write_bytes(b"")
    told = run("apply", model, mask, "-o", tmp_path / "small").stderr
    assert (
        f"1 of 30 images of {data} (train) are broken and left out: row {row} ({path.name}: it is empty)"
        in told
    )
    assert "noise" not in told  # the check has the rows that are left


def test_top1_and_top5_in_the_table_and_in_json(tmp_path):
    model = tiny_model("vit", tmp_path / "m", num_labels=8)
    data = tiny_image_folder(tmp_path / "d", 16, [f"c{i}" for i in range(8)])
    args = ["eval", model, "--baseline", model, "--data", data, "--split", "train"]
    found = json.loads(run(*args, "--json").stdout)
    assert found["metrics"].keys() == {"top1", "top5"} == found["baseline_metrics"].keys()
    told = run(*args).stdout
    for name, value in found["metrics"].items():
        assert re.search(rf"top-{name[-1]} +{value:.2f} +{value:.2f} +\+0\.00", told)
    assert "agreement" in told and "kl" in told


@pytest.mark.parametrize(
    ("data", "label"),
    [("cifar10/test.parquet", range(10)), ("imagenet-samples/validation.parquet", range(1000))],
)
def test_real_images_go_in(shared, data, label, tmp_path):
    from optin_cli.data.batches import Batches
    from optin_cli.data.examples import sample
    from optin_cli.data.sources import DataSpec
    from optin_cli.loading.checkpoint import open_model

    spec = DataSpec(str(shared / "data" / data), workers=1)
    found = sample(spec, "image", 8, 0)
    assert (len(found.row_ids), found.broken) == (8, [])
    model = open_model(str(saved_model("timm-vit")), device="cpu")
    batches = Batches(found, model.processor, 4)
    assert [tuple(batch.inputs["x"].shape) for batch in batches] == [(4, 3, 32, 32)] * 2
    labels = batches.labels()
    assert labels is not None and set(labels) <= set(label)
