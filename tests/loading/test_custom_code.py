"""Code in a model's directory runs for those who trust it, and for nobody else; nothing outside of it is copied."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import run
from helpers.data import tiny_text_csv
from helpers.models import copy_of, saved_model

from optin_cli.artefacts.files import to_json
from optin_cli.data.sources import DataSpec
from optin_cli.errors import InputError
from optin_cli.loading.checkpoint import open_model
from optin_cli.pipeline import score
from optin_cli.pruning.apply import apply
from optin_cli.runtimes.opening import open_exported
from optin_cli.scoring.plan import make_plan
from optin_cli.scoring.settings import ScoreSettings
from optin_cli.selection.select import select
from optin_cli.selection.settings import Request

CODE = """
from transformers import BertForSequenceClassification, PretrainedConfig, PreTrainedTokenizerFast

open({marker!r}, "w").close()


class MyConfig(PretrainedConfig):
    model_type = "mine"


class MyBertForSequenceClassification(BertForSequenceClassification):
    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        result = super().forward(input_ids, attention_mask, **kwargs)
        result["logits"] = 2 * result["logits"]
        return result


class MyTokenizer(PreTrainedTokenizerFast):
    pass
"""


def edited(folder: Path, file: str = "config.json", **changes: Any) -> None:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **changes}))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A model directory with Python code in it, which leaves `executed` beside it; a standard input that says yes."""
    found = copy_of(saved_model("bert"), tmp_path / "m")
    (found / "mine.py").write_text(CODE.format(marker=str(tmp_path / "executed")))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", sys.path[:])
    return found


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_model(str(folder)).processor  # noqa: B018 - a property that opens the tokenizer
    assert not (folder.parent / "executed").exists()
    assert sys.stdin.read() == "y\n" * 9, "somebody was asked"
    assert caught.value.params == ["trust_remote_code"]
    return str(caught.value)


def test_a_model_type_of_its_own_is_refused_without_a_question(folder):
    edited(folder, model_type="mine", auto_map={"AutoConfig": "mine.MyConfig"})
    assert "BertForSequenceClassification" in refused(folder)


def test_a_class_of_its_own_is_not_taken_for_the_one_of_its_model_type(folder):
    own = "MyBertForSequenceClassification"
    edited(folder, architectures=[own], auto_map={"AutoModelForSequenceClassification": f"mine.{own}"})
    assert own in refused(folder)


def test_a_tokenizer_of_its_own_is_refused(folder):
    names = ["mine.MyTokenizer", None]
    edited(folder, "tokenizer_config.json", tokenizer_class="MyTokenizer", auto_map={"AutoTokenizer": names})
    assert "the tokenizer MyTokenizer" in refused(folder)


def test_an_image_processor_of_its_own_is_refused(tmp_path, folder):
    vit = copy_of(saved_model("vit"), tmp_path / "vit")
    own = {"image_processor_type": "Mine", "auto_map": {"AutoImageProcessor": "mine.Mine"}}
    edited(vit, "preprocessor_config.json", **own)
    assert "the image processor Mine" in refused(vit)


@pytest.mark.parametrize(
    "entry",
    [
        {"attn_implementation": "some/kernel"},
        {"_attn_implementation": "some/kernel@main:forward"},
        {"text_config": {"_attn_implementation_internal": "some/kernel"}},
        {"attn_implementation": {"": "some/kernel"}},
    ],
    ids=json.dumps,
)
def test_a_kernel_of_the_hub_is_refused(folder, entry):
    edited(folder, **entry)
    assert "some/kernel" in refused(folder)


def test_code_beside_a_model_of_transformers_own_is_left_alone(folder):
    edited(folder, auto_map={"AutoModel": "mine.Other"})
    assert type(open_model(str(folder)).module).__name__ == "BertForSequenceClassification"
    assert not (folder.parent / "executed").exists()


def test_the_command_line_says_how_to_trust(folder):
    edited(folder, model_type="mine", auto_map={"AutoConfig": "mine.MyConfig"})
    said = run("inspect", folder, code=1).stderr
    assert said.count("error:") == 1 and "--trust-remote-code" in said and "trust_remote_code" not in said


def test_trusted_code_is_scored_pruned_and_loaded_again(folder, tmp_path):
    own = "MyBertForSequenceClassification"
    edited(folder, architectures=[own], auto_map={"AutoModelForSequenceClassification": f"mine.{own}"})
    model = open_model(str(folder), trust_remote_code=True)
    assert type(model.module).__name__ == own and (tmp_path / "executed").exists()
    inputs = {"input_ids": torch.tensor([[2, 5, 6, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    plain = open_model(str(saved_model("bert"))).output(inputs)
    assert torch.allclose(model.output(inputs), 2 * plain)  # its own forward runs

    data = DataSpec(str(tiny_text_csv(tmp_path)))
    ranking = score(make_plan(model, data, ScoreSettings(samples=8, batch_size=4, method="magnitude")))
    apply(model, select(ranking, Request(flops=0.6)), tmp_path / "small")
    assert (tmp_path / "small" / "mine.py").is_file()
    with pytest.raises(InputError):
        open_model(str(tmp_path / "small"))
    small = open_model(str(tmp_path / "small"), trust_remote_code=True)
    assert type(small.module).__name__ == own


def test_what_a_link_shows_of_other_folders_is_not_copied(folder, tmp_path, caplog):
    (tmp_path / "secret").write_text("a secret")
    (folder / "vocab.txt").symlink_to(tmp_path / "secret")
    (folder / "tokenizer_extra.json").symlink_to(folder / "config.json")
    found = [path.name for path in open_model(str(folder)).source.extra_files()]
    assert "vocab.txt" not in found and "tokenizer_extra.json" in found
    assert str(folder / "vocab.txt") in caplog.text


def test_a_snapshot_of_the_hubs_cache_links_to_its_blobs(tmp_path):
    there = saved_model("bert")
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "f00", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in there.iterdir():
        (blobs / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    found = open_model(str(snapshot)).source.extra_files()
    assert [path.name for path in found] == [
        path.name for path in open_model(str(there)).source.extra_files()
    ]


def test_an_index_can_not_name_weights_elsewhere(tmp_path):
    folder = copy_of(saved_model("bert"), tmp_path / "m")
    (folder / "model.safetensors").rename(tmp_path / "weights.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        to_json({"weight_map": {"a": "../weights.safetensors"}})
    )
    with pytest.raises(InputError, match="outside of its directory"):
        open_model(str(folder))


def test_timm_fetches_nothing_that_a_config_names(tmp_path):
    folder = copy_of(saved_model("timm-vit"), tmp_path / "m")
    edited(folder, architecture="hf-hub:some/model")
    with pytest.raises(InputError, match="timm has no model"):
        open_model(str(folder))


def test_code_that_is_not_trusted_is_not_exported(folder, tmp_path):
    own = "MyBertForSequenceClassification"
    edited(folder, architectures=[own], auto_map={"AutoModelForSequenceClassification": f"mine.{own}"})
    said = run("export", folder, "--to", "torch", "-o", tmp_path / "exported", code=1).stderr
    assert own in said and "--trust-remote-code" in said
    assert not (tmp_path / "executed").exists() and not (tmp_path / "exported").exists()


@pytest.mark.slow
def test_the_forward_of_trusted_code_is_in_the_exported_file(folder, tmp_path):
    own = "MyBertForSequenceClassification"
    edited(folder, architectures=[own], auto_map={"AutoModelForSequenceClassification": f"mine.{own}"})
    output = tmp_path / "exported"
    run("export", folder, "--to", "torch", "-o", output, "--trust-remote-code")
    inputs = {"input_ids": torch.tensor([[2, 5, 6, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    plain = open_model(str(saved_model("bert"))).output(inputs)
    file = torch.export.load(output / "torch/model.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(file(**inputs)["logits"][:, None], 2 * plain)
    with pytest.raises(InputError, match=own):
        open_exported(str(output))
    again = open_exported(str(output), trust_remote_code=True)
    torch.testing.assert_close(again.output(inputs), 2 * plain)
