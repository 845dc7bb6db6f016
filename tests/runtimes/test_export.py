"""Exported files give what the model in torch gives, whatever was pruned of it, at any size; and say so."""

from __future__ import annotations

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.data import tiny_image_folder
from helpers.exported import checks_of, emptied, exported, in_torch, others
from helpers.lazy import Lazy, needs_onnx
from helpers.models import opened, saved_model, tiny_model
from torch import nn

from optin_cli.artefacts.exported import FILE_NAME, read_export, record_beside
from optin_cli.data.sources import DataSpec
from optin_cli.errors import ArtefactError, InputError, OptinError, OutputDiffers, UsageError
from optin_cli.pruning.apply import apply
from optin_cli.runtimes import checks as checking
from optin_cli.runtimes import export as stage
from optin_cli.runtimes.checks import open_checks
from optin_cli.runtimes.export import ExportSettings, export
from optin_cli.runtimes.opening import is_exported, open_exported
from optin_cli.runtimes.program import outputs_read, trace
from optin_cli.runtimes.to_torch import TorchTarget
from optin_cli.scoring.plan import ScoreSettings, make_plan
from optin_cli.scoring.score import score
from optin_cli.selection.select import select

needs_onnx()
onnxruntime = Lazy("onnxruntime")

QUICK = ("bert",)  # an image model is among those that merge tokens, a decoder among those with a cache
FAMILIES = [
    *QUICK, "llama", "timm-vit", "deberta-v2", "modernbert", "mpnet", "gpt2", "gemma3", "t5", "bart", "vit", "swin",
    "dinov2-swiglu", "beit", "timm-resnet", "timm-efficientnet", "convnext", "segformer", "mask2former-swin",
    "whisper", "clip-text",
]  # fmt: skip


def assert_close(found, wanted):
    scale = max(1.0, float(wanted.abs().max()))
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) < 1e-3 * scale


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in FAMILIES]
)
def test_an_onnx_file_of_a_pruned_model_gives_its_outputs_at_other_sizes(name):
    """Heads of a block and neurons of another are all gone."""
    model, made = exported(name, "onnx")
    found = open_exported(str(made.path))
    for inputs in others(model):
        wanted = in_torch(model, inputs)
        assert_close(found.full_output(inputs), wanted)
        assert float(wanted.std()) > 1e-4  # not all alike


def test_the_file_is_run_by_onnxruntime_alone():
    """No code of ours between the file and its outputs."""
    model, made = exported("bert", "onnx")
    session = onnxruntime.InferenceSession(str(made.path), providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == ["input_ids", "attention_mask"]
    assert [one.shape for one in session.get_inputs()] == [["batch", "tokens"]] * 2
    inputs = others(model)[0]
    (logits,) = session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})
    assert_close(torch.from_numpy(logits)[:, None], in_torch(model, inputs))


def test_nothing_of_attention_without_heads_is_in_the_graph():
    import onnx

    model, made = exported("bert", "onnx")
    operators = [node.op_type for node in onnx.load(made.path).graph.node]
    attending = [site for site in model.anatomy if site.kind == "heads" and site.units]
    assert len(attending) == 1 and len(model.anatomy.blocks) == 2
    assert operators.count("Softmax") == len(attending)


def test_torch_export_gives_a_file_that_torch_alone_runs():
    model, made = exported("bert", "torch")
    module = torch.export.load(made.path).module()
    for inputs in others(model)[:1]:
        assert_close(module(**inputs)["logits"][:, None], in_torch(model, inputs))


@pytest.mark.parametrize("to", ["onnx", "torch"])
def test_a_file_does_not_tell_where_code_lies_on_this_machine(to):
    _, made = exported("bert", to)
    content = made.path.read_bytes()
    if to == "torch":
        with zipfile.ZipFile(made.path) as archive:
            content = b"".join(map(archive.read, archive.namelist()))
    for package in (torch, __import__("transformers"), __import__("optin_cli")):
        assert str(Path(package.__file__).parent).encode() not in content
    assert b"site-packages" not in content and b'File "' not in content


@pytest.mark.slow
def test_openvino_gives_the_same():
    pytest.importorskip("openvino", reason="needs the extra openvino")
    model, made = exported("bert", "openvino")
    assert made.path.name == "openvino_model.xml" and made.path.with_suffix(".bin").is_file()
    found = open_exported(str(made.path))
    for inputs in others(model):
        assert_close(found.full_output(inputs), in_torch(model, inputs))


@pytest.mark.slow
def test_half_precision_keeps_float32_outside():
    model, made = exported("timm-vit", "onnx", fp16=True)
    session = onnxruntime.InferenceSession(str(made.path), providers=["CPUExecutionProvider"])
    assert {one.type for one in (*session.get_inputs(), *session.get_outputs())} == {"tensor(float)"}
    inputs = others(model)[0]
    found, wanted = open_exported(str(made.path)).full_output(inputs), in_torch(model, inputs)
    assert 1e-6 < float((found - wanted).abs().max()) < 3e-2 * max(1.0, float(wanted.abs().max()))
    assert made.bytes < 0.7 * exported("timm-vit", "onnx")[1].bytes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm-vit", "vit"])
def test_a_model_that_merges_tokens_gives_its_outputs(name, tmp_path):
    """The number of tokens of an image is fixed, and so is that of each block: the number of images is open."""
    dense = opened(saved_model(name))
    settings = ScoreSettings(method="magnitude", samples=8)
    data = DataSpec(str(tiny_image_folder(tmp_path / "images")))
    ranking = score(make_plan(dense, data, settings), tmp_path / "r.h5")
    apply(dense, replace(select(ranking, 0.6), merges=[3, 2]), tmp_path / "small")
    model = opened(tmp_path / "small")
    assert model.merges == [3, 2]
    made = export(model, ExportSettings("onnx"), tmp_path / "m.onnx", checks_of)
    for inputs in others(model):
        assert_close(open_exported(str(made.path)).full_output(inputs), in_torch(model, inputs))


# ---- what is beside the file ----


def test_a_directory_opens_without_the_model(tmp_path):
    """Config, tokenizer and record came along: the model may be gone, and libraries find a stock config."""
    model, made = exported("bert", "onnx")
    folder = shutil.copytree(made.path.parents[1], tmp_path / "moved")
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "bert" and "auto_map" not in config
    assert (folder / "tokenizer.json").is_file() and not list(folder.glob("*.safetensors"))
    inputs = others(model)[0]
    for spec in (folder, folder / "onnx/model.onnx"):
        found = open_exported(str(spec))
        assert_close(found.full_output(inputs), in_torch(model, inputs))
    assert {s.name: s.units for s in found.anatomy} == {s.name: s.units for s in model.anatomy}


def test_the_record_says_how_near_the_file_is():
    model, made = exported("bert", "onnx")
    record = read_export(made.path.parents[1] / FILE_NAME)
    assert record.model["digest"] == model.digest and record.model["task"] == "sequence-classification"
    facts = record.files["onnx/model.onnx"]
    assert facts == made.facts
    assert 0 <= facts["deviation"] <= facts["tolerance"]
    assert facts["shapes"] == [[3, 9], [2, 5]]
    assert facts["opset"] >= 18 and set(facts["versions"]) == {"torch", "onnx", "onnxscript", "onnxruntime"}


def test_a_single_file_has_its_record_beside_it(tmp_path):
    source = shutil.copytree(saved_model("bert", blocks=1), tmp_path / "m")
    model = opened(source)
    made = export(model, ExportSettings("torch"), tmp_path / "m.pt2", checks_of)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "m.pt2", "m.pt2.json"]
    inputs = others(model)[0]
    assert_close(open_exported(str(made.path)).full_output(inputs), in_torch(model, inputs))
    tiny_model("bert", source, seed=1, num_hidden_layers=1)
    with pytest.raises(ArtefactError, match="exported from other weights"):
        open_exported(str(made.path))
    record_beside(made.path).unlink()
    with pytest.raises(UsageError, match="no record beside it"):
        open_exported(str(made.path))


def test_files_of_one_model_share_a_directory(tmp_path):
    model, made = exported("bert", "onnx")
    folder = shutil.copytree(made.path.parents[1], tmp_path / "both")
    second = export(model, ExportSettings("torch"), folder, checks_of)
    assert set(read_export(folder / FILE_NAME).files) == {"onnx/model.onnx", "torch/model.pt2"}
    assert second.path.is_file() and (folder / "onnx/model.onnx").is_file()
    again = export(model, ExportSettings("torch"), folder, lambda _: pytest.fail("it is there"))
    assert again.reused and again.facts == second.facts
    with pytest.raises(UsageError, match="holds 2 exported files"):
        open_exported(str(folder))
    other = opened(saved_model("bert"))
    with pytest.raises(OutputDiffers, match="exported from another model"):
        export(other, ExportSettings("torch"), folder, checks_of)


# ---- a file that is not right gets no name ----


def test_a_file_that_deviates_is_not_kept(tmp_path, monkeypatch):
    model = opened(saved_model("bert", blocks=1))
    write = stage.TARGETS["torch"].write

    def other(traced, path, opset):
        state = traced.program.state_dict["body.classifier.bias"]
        state.data = state.data + 0.1
        return write(traced, path, opset)

    monkeypatch.setattr(stage.TARGETS["torch"], "write", other)
    with pytest.raises(OptinError, match=r"deviates by 1\.00e-01"):
        export(model, ExportSettings("torch"), tmp_path / "m.pt2", checks_of)
    assert not list(tmp_path.iterdir())


def test_a_length_that_was_fixed_on_the_way_shows(tmp_path):
    """The second batch has other sizes for this."""
    model = opened(saved_model("bert", blocks=1))
    checks = checks_of(model)
    first = checks.batches[0]
    traced = trace(model, first)
    fixed = torch.export.export(traced.module, (), dict(first), strict=False)
    torch.export.save(fixed, tmp_path / "fixed.pt2")
    session = stage.TARGETS["torch"].load(tmp_path / "fixed.pt2", traced.outputs)
    wanted = stage.expected(model, traced.module, checks)
    with pytest.raises((OptinError, RuntimeError, AssertionError)):
        stage.deviation(session, wanted, checks, "float32")


class Unknown(nn.Module):
    """Something that ONNX has no operator for."""

    def forward(self, x):
        return x + torch.special.bessel_j0(x)


class Branching(nn.Module):
    """A branch on a value, which no trace can follow."""

    def forward(self, x):
        return x if float(x.sum()) > 0 else -x


def test_an_operator_without_a_translation_is_named_with_its_module(tmp_path):
    model = opened(saved_model("bert", blocks=1))
    model.module.bert.encoder.layer[0].intermediate.intermediate_act_fn = Unknown()
    with pytest.raises(
        InputError, match=r"bert\.encoder\.layer\.0\.intermediate\.\w+ \(Unknown\).*bessel_j0"
    ):
        export(model, ExportSettings("onnx"), tmp_path / "m.onnx", checks_of)
    assert not list(tmp_path.iterdir())


def test_what_can_not_be_traced_is_named_with_its_module(tmp_path):
    model = opened(saved_model("bert", blocks=1))
    model.module.bert.encoder.layer[0].output.dropout = Branching()
    with pytest.raises(
        InputError, match=r"can't be traced in bert\.encoder\.layer\.0\.output\.dropout \(Branching\)"
    ):
        export(model, ExportSettings("torch"), tmp_path / "m.pt2", checks_of)


# ---- refusals ----


@pytest.mark.parametrize(
    ("settings", "name", "message"),
    [
        (ExportSettings("tflite"), "m", "unknown runtime 'tflite'"),
        (ExportSettings("onnx", fp16=True, int8=True), "m", "two precisions"),
        (ExportSettings("torch", int8=True), "m", "is for onnx"),
        (ExportSettings("torch", opset=18), "m", "is about ONNX"),
        (ExportSettings("onnx", max_error=-1.0), "m", "negative"),
        (ExportSettings("torch"), "m.onnx", "is a name for onnx"),
        (ExportSettings("torch"), "taken", "was not made by optin export"),
        (ExportSettings("torch"), "taken/text.pt2", "was not made by optin export"),
    ],
)
def test_settings_that_can_not_be(tmp_path, settings, name, message):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/text.pt2").write_text("mine")
    model = opened(saved_model("bert"))
    with pytest.raises(UsageError, match=message):
        export(model, settings, tmp_path / name, lambda _: pytest.fail("refused before"))
    assert (tmp_path / "taken/text.pt2").read_text() == "mine"


def test_the_model_is_not_written_over(tmp_path):
    source = shutil.copytree(emptied("bert"), tmp_path / "m")
    model = opened(source)
    with pytest.raises(UsageError, match="is the model being read"):
        export(model, ExportSettings("torch"), source, lambda _: pytest.fail("refused before"))


@pytest.mark.parametrize(
    ("to", "package", "int8"),
    [("onnx", "onnxscript", False), ("openvino", "openvino", False), ("openvino", "nncf", True)],
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, tmp_path, to, package, int8):
    if int8:
        pytest.importorskip("openvino", reason="needs the extra openvino")
    monkeypatch.setitem(__import__("sys").modules, package, None)
    model = opened(saved_model("bert"))
    with pytest.raises(UsageError, match=rf"{package} is not installed\n  pip install 'optin\[{to}\]'"):
        export(model, ExportSettings(to, int8=int8), tmp_path / "m", lambda _: pytest.fail("refused before"))


def test_without_data_texts_are_general_english():
    checks = open_checks(opened(saved_model("bert")), None)
    assert checks.where == "builtin:prose"
    (rows, longer), (fewer, shorter) = checks.shapes
    assert rows > fewer >= 2 and longer > shorter >= 2


def test_where_english_can_not_be_read_random_tokens_are_compared(monkeypatch):
    def no_such_column(*_, **__):
        raise InputError("the rows have no column for it")

    monkeypatch.setattr(checking, "open_batches", no_such_column)
    checks = open_checks(opened(saved_model("bert")), None)
    assert (checks.where, checks.data) == ("noise", None)
    assert {"input_ids", "attention_mask"} <= set(checks.batches[0])
    assert checks.shapes[0] != checks.shapes[1]
    with pytest.raises(InputError, match="no column"):
        open_checks(opened(saved_model("bert")), DataSpec("mine.csv"))


def test_outputs_are_those_that_the_task_reads():
    model = opened(saved_model("bert", "encoder"))
    assert outputs_read(model, checks_of(model).batches[0]) == ["last_hidden_state"]
    reader = opened(saved_model("bert", "reader"))
    assert outputs_read(reader, checks_of(reader).batches[0]) == ["start_logits", "end_logits"]


def test_other_files_are_no_exports(tmp_path):
    (tmp_path / "m.bin").write_bytes(b"x")
    assert not is_exported(str(tmp_path / "m.bin")) and not is_exported(str(tmp_path))
    assert is_exported(str(exported("bert", "onnx")[1].path))
    assert np.isfinite(exported("bert", "onnx")[1].facts["deviation"])


def test_a_full_disk_and_a_damaged_archive_of_torch_are_errors(tmp_path, caplog):
    """torch's own writer ends the process on a full disk, and its reader logs a traceback."""
    program = torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),))
    with pytest.raises(OSError, match="No space left"):
        TorchTarget().write(SimpleNamespace(program=program), Path("/dev/full"), None)
    (tmp_path / "m.pt2").write_bytes(b"PK damaged")
    with pytest.raises(InputError, match="torch can't open"):
        TorchTarget().load(tmp_path / "m.pt2", ["y"])
    assert "Traceback" not in caplog.text
