"""Bad input: one message, the right code, nothing half-written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import h5py
import pytest
from helpers.cli import FAST, process, run
from helpers.data import tiny_image_folder, tiny_text_csv
from helpers.models import saved_model, tiny_model
from helpers.rankings import resealed

from optin_cli.loading import checkpoint

ROOT = Path(__file__).resolve().parents[2]


def bad(tmp_path, *args, code: int, says: str) -> None:
    before = sorted(p for p in tmp_path.rglob("*"))
    result = run(*args, code=code)
    text = " ".join(result.stderr.split())  # rich wraps long lines
    assert says in text, text
    assert text.count("error:") == 1
    assert "Traceback" not in text
    assert sorted(p for p in tmp_path.rglob("*")) == before


def test_missing_paths(scored, tmp_path):
    model, data, ranking = scored
    out = tmp_path / "new"
    bad(tmp_path, "score", tmp_path / "no", "--data", data, "-o", out, code=2, says="no model directory")
    bad(tmp_path, "score", model, "--data", tmp_path / "no.csv", "-o", out, code=2, says="no data at")
    bad(tmp_path, "select", tmp_path / "no.h5", "--flops", 0.5, "-o", out, code=2, says="no ranking")
    bad(tmp_path, "apply", model, tmp_path / "no.json", "-o", out, code=2, says="can't read a mask")
    bad(tmp_path, "inspect", tmp_path / "no", code=2, says="nothing at")
    near = tmp_path / "trian.csv"
    says = f"no data at {near} did you mean {data}?"
    bad(tmp_path, "score", model, "--data", near, "-o", out, code=2, says=says)
    near = model.with_name(model.name + "s")
    bad(tmp_path, "score", near, "--data", data, "-o", out, code=2, says=f"did you mean {model}?")
    says = "is a folder, not a name for a"
    bad(tmp_path, "score", model, "--data", data, "-o", tmp_path, code=2, says=says)
    for force in ([], ["--force"]):
        bad(tmp_path, "select", ranking, "--flops", 0.5, "-o", tmp_path, *force, code=2, says=says)
    bad(
        tmp_path,
        "select",
        ranking,
        "--flops",
        0.5,
        "-o",
        data / "m.json",
        code=2,
        says="can't create the folder",
    )


def test_a_name_that_ends_in_a_slash_is_a_folders(scored, tmp_path):
    _, _, ranking = scored
    says = "is a folder, not a name for a mask give a name in it"
    for flops, name in (("0.5", "new/"), ("0.5,0.7", "{}/")):
        bad(tmp_path, "select", ranking, "--flops", flops, "-o", f"{tmp_path}/{name}", code=2, says=says)


@pytest.mark.parametrize("steps", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_another_pruned_model_in_the_way_is_told_before_scoring(steps, scored, tmp_path, monkeypatch):
    """No ranking is there after it, neither of the first step nor of the last."""
    model, data, ranking = scored
    monkeypatch.chdir(tmp_path)
    small = ("-o", tmp_path / "small", "--compensate", "none", "-q")
    asked = ("prune", model, "--data", data, "--flops", 0.5, *FAST, "--steps", steps, *small)
    run("prune", model, "--data", data, "--flops", 0.7, "--ranking", ranking, *FAST, *small)
    says = "small holds a pruned model already, and the ranking to compare it by is still to be made"
    bad(tmp_path, *asked, code=2, says=says)
    run(*asked, "--force")
    kept = (tmp_path / "small" / "optin.json").read_bytes()
    run(*asked)  # the rankings are there now, and it is the same model
    assert (tmp_path / "small" / "optin.json").read_bytes() == kept


def test_an_artefact_of_another_kind_is_called_what_it_is(scored, tmp_path):
    model, _, ranking = scored
    mask = tmp_path / "m.mask"  # of any name
    run("select", ranking, "--flops", 0.5, "-o", mask, "-q")
    out = tmp_path / "new"
    says = "m.mask is a mask, not a ranking write one with `optin score"
    bad(tmp_path, "select", mask, "--flops", 0.5, "-o", out, code=3, says=says)
    bad(tmp_path, "inspect", mask, "--stability", code=3, says=says)
    says = "r.h5 is a ranking, not a mask write one with `optin select`"
    bad(tmp_path, "apply", model, ranking, "-o", out, code=3, says=says)
    table = ("--latency", 0.5, "--latency-table")
    for file, kind in ((ranking, "ranking"), (mask, "mask")):
        says = f"{file.name} is a {kind}, not a latency table"
        bad(tmp_path, "select", ranking, *table, file, "-o", out, code=3, says=says)
    says = "is a folder, not a ranking"
    bad(tmp_path, "select", tmp_path, "--flops", 0.5, "-o", out, code=2, says=says)
    assert "m.mask: mask" in run("inspect", mask).stdout


def test_steps_that_can_not_be_taken_are_told_before_anything_is_read(tmp_path):
    """There is no such model: it was not looked for."""
    asked = ("prune", "no/such/model", "--data", "no.csv", "-o", tmp_path / "m")
    bad(tmp_path, *asked, "--flops", 0.5, "--steps", 0, code=2, says="at least 1 is needed")
    bad(tmp_path, *asked, "--memory", "1MiB", "--steps", 2, code=2, says="needs a budget that is a share")


def test_a_table_with_many_mistakes_names_a_few(scored, tmp_path):
    model, data, ranking = scored
    mask = tmp_path / "m.json"
    run("select", ranking, "--flops", 0.5, "-o", mask, "-q")
    bad(
        tmp_path,
        "score",
        model,
        "--data",
        data,
        "--anatomy",
        mask,
        "-o",
        tmp_path / "r.h5",
        code=2,
        says="more",
    )


def test_damaged_pruned_models(scored, tmp_path):
    model, _, ranking = scored
    mask, small = tmp_path / "m.json", tmp_path / "small"
    run("select", ranking, "--flops", 0.5, "-o", mask, "-q")
    run("apply", model, mask, "-o", small, "--compensate", "none", "-q")
    weights = (small / "model.safetensors").read_bytes()
    (small / "model.safetensors").write_bytes(weights[:-100])
    bad(tmp_path, "bench", small, code=3, says="its safetensors file is damaged")
    bad(tmp_path, "inspect", small, code=3, says="model.safetensors is damaged")
    (small / "model.safetensors").unlink()
    bad(tmp_path, "inspect", small, code=3, says="holds no weights")
    (small / "model.safetensors").write_bytes(weights)
    record = small / "optin.json"
    record.write_text(record.read_text().replace('"heads"', '"haeds"'))
    bad(tmp_path, "bench", small, code=3, says="optin.json is damaged: its family is not a family table")


def test_data_that_can_not_be_used(tmp_path):
    model = saved_model("bert")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "header.csv").write_text("sentence,label\n")
    (tmp_path / "numbers.csv").write_text("a,b\n1,2\n3,4\n")
    images = tiny_image_folder(tmp_path / "images")
    out = tmp_path / "r.h5"
    for name, code, says in (
        ("empty.csv", 1, "empty"),
        ("header.csv", 1, "empty"),
        ("numbers.csv", 1, "no text column"),
    ):
        bad(tmp_path, "score", model, "--data", tmp_path / name, "-o", out, code=code, says=says)
    bad(tmp_path, "score", model, "--data", images, "-o", out, code=1, says="no text column")
    text = tiny_text_csv(tmp_path)
    bad(tmp_path, "score", saved_model("vit"), "--data", text, "-o", out, code=1, says="no image column")
    bad(
        tmp_path, "score", model, "--data", text, "--text", "nope", "-o", out, code=2, says="no column 'nope'"
    )


@pytest.mark.slow
def test_a_damaged_json_file_is_one_message(tmp_path):
    """In a process of its own, for `datasets` logs to the stderr that it found when it was imported."""
    model = tiny_model("bert", tmp_path / "model")
    (tmp_path / "rows.json").write_text("{")
    done = process("score", model, "--data", tmp_path / "rows.json", "-o", tmp_path / "r.h5")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "suffix" in done.stderr


def test_fewer_rows_than_asked_are_used_with_a_warning(tmp_path):
    data = tiny_text_csv(tmp_path, rows=8)
    result = run(
        "score",
        saved_model("bert"),
        "--data",
        data,
        "-o",
        tmp_path / "r.h5",
        "--samples",
        100,
        "--method",
        "random",
    )
    assert "fewer than the 100 asked for" in " ".join(result.stderr.split())


@pytest.mark.parametrize(("flops", "code"), [("0", 2), ("-1", 2), ("1.5", 2), ("x", 2), ("nan", 2)])
def test_budgets_that_are_no_fraction(scored, tmp_path, flops, code):
    run("select", scored[2], f"--flops={flops}", "-o", tmp_path / "m.json", code=code)
    assert not (tmp_path / "m.json").exists()


def test_budgets_out_of_reach_name_the_smallest(scored, tmp_path):
    args = ["select", scored[2], "--min-heads", 2, "--min-neurons", 30, "-o", tmp_path / "m.json"]
    bad(tmp_path, *args, "--flops", 0.1, code=4, says="smallest budget that can be reached is --flops")
    text = run(*args, "--flops", 0.1, code=4).stderr
    smallest = re.search(r"reached is\s+--flops\s+([\d.]+)", text)[1].rstrip(".")
    run(*args, "--flops", smallest)


def test_damaged_rankings(scored, tmp_path):
    ranking = scored[2]
    (tmp_path / "cut.h5").write_bytes(ranking.read_bytes()[: ranking.stat().st_size // 2])
    (tmp_path / "text.h5").write_text("hello")
    (tmp_path / "half.h5").write_bytes(ranking.read_bytes())
    with h5py.File(tmp_path / "half.h5", "a") as file:
        del file.attrs["complete"]
    resealed(tmp_path / "half.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = [1]
    out = tmp_path / "m.json"
    for name, says in (
        ("cut.h5", "is damaged"),
        ("text.h5", "is a text file, not a ranking"),
        ("half.h5", "incomplete"),
        ("other.h5", "not a ranking"),
    ):
        bad(tmp_path, "select", tmp_path / name, "--flops", 0.5, "-o", out, code=3, says=says)


def test_a_ranking_of_another_model(scored, tmp_path):
    _, data, ranking = scored
    other = tiny_model("bert", tmp_path / "other", seed=9)
    args = [
        "prune",
        other,
        "--data",
        data,
        "--flops",
        0.5,
        "--ranking",
        ranking,
        "-o",
        tmp_path / "out",
        *FAST,
    ]
    bad(tmp_path, *args, code=3, says="ranks other weights")


def test_prune_refuses_before_it_scores(scored, tmp_path):
    model, data, _ = scored
    new = tmp_path / "new.h5"
    args = ["prune", model, "--data", data, "--ranking", new, *FAST]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    bad(tmp_path, *args, "--flops", 2, "-o", tmp_path / "out", code=2, says="not a fraction")
    bad(tmp_path, *args, "--flops", 0.5, "-o", tmp_path / "mine", code=2, says="not made by optin")
    assert not new.exists()


def test_masks_that_do_not_fit(scored, tmp_path):
    model, _, ranking = scored
    mask, out = tmp_path / "m.json", tmp_path / "out"
    run("select", ranking, "--flops", 0.5, "-o", mask, "-q")
    other = tiny_model("bert", tmp_path / "other", seed=9)
    bad(tmp_path, "apply", other, mask, "-o", out, code=3, says="other weights")
    deeper = tiny_model("bert", tmp_path / "deeper", num_hidden_layers=4)
    bad(tmp_path, "apply", deeper, mask, "-o", out, code=3, says="other sites")
    content = json.loads(mask.read_text())
    for indices, says in (([0, 99], "out of range"), ([1, 1], "twice"), ([3, 0], "not ascending")):
        content["keep"]["blocks.0.heads"] = indices
        (tmp_path / "bad.json").write_text(json.dumps(content))
        bad(tmp_path, "apply", model, tmp_path / "bad.json", "-o", out, code=3, says=says)


def test_model_directories_without_usable_weights(scored, tmp_path):
    data, out = scored[1], tmp_path / "out.h5"
    empty = tiny_model("bert", tmp_path / "empty")
    (empty / "model.safetensors").unlink()
    bad(tmp_path, "score", empty, "--data", data, "-o", out, code=1, says="holds no weights")
    (tmp_path / "nothing").mkdir()
    bad(tmp_path, "score", tmp_path / "nothing", "--data", data, "-o", out, code=1, says="no config.json")


def test_the_quality_gate(scored, tmp_path):
    model, data, ranking = scored
    run("select", ranking, "--flops", 0.05, "-o", tmp_path / "m.json", "-q")
    run("apply", model, tmp_path / "m.json", "-o", tmp_path / "out", "-q")
    arguments = ["eval", tmp_path / "out", "--baseline", model, "--data", data, "--split", "train"]
    run(*arguments, "--max-drop", 100)
    failed = run(*arguments, "--max-drop", -100, code=5)
    assert "points" in failed.stderr


def test_a_gate_without_a_dense_model_fails_before_anything_is_opened(tmp_path):
    args = ("eval", tmp_path / "no", "--data", tmp_path / "no.csv", "--max-drop", 1)
    bad(tmp_path, *args, code=2, says="--max-drop needs a dense model to compare with")


@pytest.mark.slow
def test_a_full_disk_leaves_nothing(scored, tmp_path):
    """A real failing write: the process may not write files beyond 8 KiB."""
    model, data, ranking = scored
    run("select", ranking, "--flops", 0.5, "-o", tmp_path / "m.json", "-q")
    limit = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)); "
    limit += "sys.argv = ['optin', *sys.argv[1:]]; runpy.run_module('optin_cli', run_name='__main__')"
    before = sorted(p for p in tmp_path.rglob("*"))
    for args in (
        ["score", model, "--data", data, "-o", tmp_path / "new.h5", "--method", "magnitude"],
        ["apply", model, tmp_path / "m.json", "-o", tmp_path / "out"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", limit, *map(str, args)],
            capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert done.returncode == 1, done.stderr
        assert "disk is full" in " ".join(done.stderr.split()), done.stderr
    left = [p for p in sorted(tmp_path.rglob("*")) if p not in before]
    assert left == []


def test_wrong_options(scored, tmp_path):
    model, data, _ = scored
    out = tmp_path / "r2.h5"
    bad(
        tmp_path,
        "score",
        model,
        "--data",
        data,
        "-o",
        out,
        "--method",
        "guess",
        code=2,
        says="unknown method",
    )
    bad(tmp_path, "score", model, "--data", data, "-o", out, "--dtype", "int3", code=2, says="unknown dtype")
    bad(
        tmp_path, "score", model, "--data", data, "-o", out, "--device", "moon", code=2, says="unknown device"
    )
    bad(
        tmp_path, "score", model, "--data", data, "-o", out, "--task", "juggling", code=2, says="unknown task"
    )
    bad(tmp_path, "bench", model, "--batch-size", "a", code=2, says="whole numbers")
    bad(tmp_path, "bench", model, "--image-size", "32", code=2, says="--seq-len")
    bad(tmp_path, "bench", model, "--seq-len", "4096", code=2, says="64")
    run("score", model, code=2)


def test_an_output_that_can_not_be_written_is_told_before_the_model_is_opened(scored, tmp_path, monkeypatch):
    model, data, ranking = scored
    mask, blocked = tmp_path / "m.json", tmp_path / "file" / "small"
    run("select", ranking, "--flops", 0.6, "-o", mask)
    (tmp_path / "file").write_text("x")
    for opener in ("open_model", "open_module"):
        monkeypatch.setattr(checkpoint, opener, lambda *_, **__: pytest.fail("the model was opened"))
    for command in (
        ("bench", model, "--table", tmp_path / "file" / "t.json"),
        ("bench", model, "--csv", tmp_path / "file" / "t.csv"),
        ("families", "--trace", model, "-o", tmp_path / "file" / "t.yaml"),
        ("apply", model, mask, "-o", blocked),
        ("prune", model, "--data", data, "--flops", 0.6, "-o", blocked),
        ("prune", model, "--data", data, "--flops", 0.6, "-o", "/proc/small"),
        ("score", model, "--data", data, "-o", tmp_path / "file" / "r.h5"),
        ("score", model, "--data", data, "-o", tmp_path / ("a" * 300)),
    ):
        bad(tmp_path, *command, code=2, says="can't ")
