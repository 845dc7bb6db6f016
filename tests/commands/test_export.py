"""`optin export`, and `bench` and `eval` of what it wrote."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from helpers.cli import run
from helpers.data import tiny_text_csv
from helpers.exported import dense_of, emptied
from helpers.lazy import needs_onnx
from helpers.models import copy_of, new_folder, saved_model

from optin_cli.artefacts.exported import FILE_NAME

needs_onnx()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(data, directory of ONNX, what was printed)."""
    data, output = tiny_text_csv(tmp_path_factory.mktemp("data")), new_folder() / "m-onnx"
    said = run("export", emptied("bert"), "--to", "onnx", "--data", data, "-o", output)
    return data, output, said


def test_it_prints_the_file_and_how_near_it_is(written):
    data, output, said = written
    assert said.stdout.split() == [str(output / "onnx/model.onnx")]
    line = r"largest deviation from torch: \d\.\de-\d\d \(allowed: .*\), on .*, inputs of \d+ x \d+ and \d+ x \d+"
    assert re.search(line, " ".join(said.stderr.split()))
    assert "opset" in said.stderr and str(data) in said.stderr.replace("\n", "")


def test_a_second_run_reuses_the_file(written):
    _, output, _ = written
    before = (output / "onnx/model.onnx").stat().st_mtime_ns
    said = run("export", emptied("bert"), "--to", "onnx", "-o", output, "--json")
    assert json.loads(said.stdout)["reused"]
    assert before <= (output / "onnx/model.onnx").stat().st_mtime_ns


def test_bench_runs_the_file_beside_torch(written):
    _, output, _ = written
    options = ["--batch-size", "2", "--seq-len", "8", "--seconds", "0", "--repeats", "2"]
    said = run("bench", output, "--baseline", dense_of("bert"), *options, "--json")
    dense, found = json.loads(said.stdout)["timings"]
    assert (dense["execution"], dense["dtype"]) == ("eager", "float32")
    assert found["execution"].startswith("onnxruntime ") and found["peak_memory"] is None
    assert found["macs"] < dense["macs"] and found["speedup"] > 0
    assert found["disk_bytes"] == (output / "onnx/model.onnx").stat().st_size
    table = run("bench", output, "--baseline", emptied("bert"), *options)
    assert "run by" in table.stdout and "torch, float32" in table.stdout


def test_eval_measures_the_file(written):
    data, output, _ = written
    common = ["--data", data, "--json"]
    theirs, ours = (
        json.loads(run("eval", model, "--baseline", dense_of("bert"), *common).stdout)
        for model in (emptied("bert"), output / "onnx/model.onnx")
    )
    assert ours["metrics"] == pytest.approx(theirs["metrics"], abs=0.01)
    assert ours["fidelity"] == pytest.approx(theirs["fidelity"], rel=1e-2)


def test_a_file_is_for_bench_and_eval_alone(written, tmp_path):
    data, output, _ = written
    file = output / "onnx/model.onnx"
    assert (
        "is a file; a model is" in run("score", file, "--data", data, "-o", tmp_path / "r.h5", code=2).stderr
    )
    assert "models in torch" in run("bench", file, "--table", tmp_path / "t.json", code=2).stderr
    assert "onnxruntime" in run("bench", file, "--compile", code=2).stderr
    assert "measured on a CPU" in run("bench", file, "--device", "cuda", code=2).stderr
    assert "whose dtype is fixed" in run("bench", file, "--dtype", "float16", code=2).stderr


def test_a_damaged_record_is_named(written, tmp_path):
    _, output, _ = written
    folder = copy_of(output, tmp_path / "m")
    record = json.loads((folder / FILE_NAME).read_text())
    record["files"] = {"../../m.onnx": record["files"]["onnx/model.onnx"]}
    (folder / FILE_NAME).write_text(json.dumps(record))
    assert "outside of its folder" in run("bench", folder, code=3).stderr
    (folder / "onnx/model.onnx").write_bytes(b"no model")
    (folder / FILE_NAME).write_text((output / FILE_NAME).read_text())
    assert "onnxruntime can't open" in run("bench", folder, code=1).stderr


def test_inspect_shows_what_the_record_says(written, tmp_path):
    _, output, _ = written
    for given in (output, output / "onnx/model.onnx", output / FILE_NAME):
        said = run("inspect", given)
        shown = " ".join(said.stdout.split())
        assert "exported model" in said.stdout and str(dense_of("bert")) in said.stdout.replace("\n", "")
        assert re.search(r"onnx/model\.onnx .*onnx, opset \d+, float32", shown)
        assert re.search(r"from torch \d\.\de-\d\d \(allowed", shown) and "onnxruntime" in shown
        found = json.loads(run("inspect", given, "--json").stdout)
        assert (found["kind"], found["path"], found["prunings"]) == ("exported model", str(given), 1)
        record = json.loads((output / FILE_NAME).read_text())
        assert found["files"] == record["files"] and found["model"] == record["model"]
    (damaged := copy_of(output, tmp_path / "m")).joinpath(FILE_NAME).write_text("{}")
    assert "is not the record of exported files" in run("inspect", damaged, code=3).stderr


def test_a_folder_that_is_removed_meanwhile_is_one_message(tmp_path, monkeypatch):
    from optin_cli.runtimes.to_torch import TorchTarget

    write, folder = TorchTarget.write, tmp_path / "out"

    def removed(self, traced, path, opset):
        facts = write(self, traced, path, opset)
        shutil.rmtree(folder)
        return facts

    folder.mkdir()
    monkeypatch.setattr(TorchTarget, "write", removed)
    done = run("export", saved_model("bert", blocks=1), "--to", "torch", "-o", folder / "m.pt2", code=1)
    assert done.stderr.count("error: ") == 1 and "unexpected" not in done.stderr
    assert not list(tmp_path.rglob("*m.pt2*"))  # nothing has its name
