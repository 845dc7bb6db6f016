"""`apply` on every family: what is written equals the masked model, loads again, and can be pruned again."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.data import tiny_text_csv
from helpers.families import ALL
from helpers.models import saved_model, tiny_model
from helpers.pruning import pruned, rank
from helpers.runs import random_inputs

import optin_cli
from optin_cli.artefacts.pruned import read_pruned
from optin_cli.data.sources import DataSpec
from optin_cli.errors import ArtefactError, OptinError, UsageError
from optin_cli.loading.checkpoint import open_model
from optin_cli.pruning import apply as stage
from optin_cli.pruning.check import open_check
from optin_cli.selection.select import select
from optin_cli.transforms.masking import masked, masks_from_keep


@pytest.mark.parametrize("name", ALL)
def test_the_written_model_is_the_masked_one(name, tmp_path):
    source, mask, applied = pruned(name, tmp_path)
    assert applied.deviation <= 1e-5
    dense, sliced = open_model(str(source)), open_model(str(tmp_path / "out"))
    inputs = random_inputs(dense)
    with (
        torch.inference_mode(),
        masked(dense.module, dense.anatomy, masks_from_keep(dense.anatomy, mask.keep)),
    ):
        expected = dense.output(inputs)
    with torch.inference_mode():
        torch.testing.assert_close(sliced.output(inputs), expected, rtol=0, atol=1e-5)
    assert {s.name: s.units for s in sliced.anatomy} == {n: len(k) for n, k in mask.keep.items()}
    assert type(sliced.module) is type(dense.module)


@pytest.mark.parametrize("name", [ALL[0], *(pytest.param(name, marks=pytest.mark.slow) for name in ALL[1:])])
def test_pruning_twice_composes_and_counts_from_the_dense_model(name, tmp_path):
    source, mask, _ = pruned(name, tmp_path, flops=0.7)
    once = open_model(str(tmp_path / "out"))
    dense = open_model(str(source))
    ranking = rank(once, tmp_path / "second")
    again = select(ranking, 0.4)
    applied = stage.apply(once, again, tmp_path / "twice")
    assert applied.deviation <= 1e-5
    twice = open_model(str(tmp_path / "twice"))
    assert twice.anatomy.macs(ranking.tokens) <= 0.4 * dense.anatomy.macs(ranking.tokens)
    record = read_pruned(tmp_path / "twice")
    assert len(record.history) == 2
    assert record.dense["digest"] == dense.digest
    inputs = random_inputs(dense)
    with (
        torch.inference_mode(),
        masked(dense.module, dense.anatomy, masks_from_keep(dense.anatomy, record.kept)),
    ):
        expected = dense.output(inputs)
    with torch.inference_mode():
        torch.testing.assert_close(twice.output(inputs), expected, rtol=0, atol=1e-5)
    for name, indices in again.keep.items():
        assert record.kept[name] == [mask.keep[name][i] for i in indices]


@pytest.mark.parametrize("name", [ALL[0], *(pytest.param(name, marks=pytest.mark.slow) for name in ALL[1:])])
def test_a_layer_without_heads_or_neurons_works(name, tmp_path):
    model = open_model(str(saved_model(name)))
    mask = select(rank(model, tmp_path), 1.0)
    mask.keep["blocks.1.heads"] = []
    mask.keep["blocks.2.neurons"] = []
    assert stage.apply(model, mask, tmp_path / "out").deviation <= 1e-5
    emptied = open_model(str(tmp_path / "out"))
    assert emptied.anatomy["blocks.1.heads"].units == 0
    second = select(rank(emptied, tmp_path / "second"), 0.3)
    assert stage.apply(emptied, second, tmp_path / "twice").deviation <= 1e-5


def test_load_returns_a_ready_module(tmp_path):
    pruned("bert", tmp_path)
    module = optin_cli.load(tmp_path / "out")
    assert not module.training
    assert type(module).__name__ == "BertForSequenceClassification"
    model = open_model(str(tmp_path / "out"))
    assert module(**random_inputs(model)).logits.shape == (3, 2)
    module(**random_inputs(model)).logits.sum().backward()  # a loaded model can be trained further


def test_the_directory_is_complete_and_holds_no_pickle(tmp_path):
    source, _, _ = pruned("bert", tmp_path)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "optin.json",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= names
    assert not [n for n in names if n.endswith((".bin", ".pt", ".pkl"))]
    record = json.loads((tmp_path / "out" / "optin.json").read_text())
    assert record["per_layer_config"]["0"].keys() == {"num_attention_heads", "intermediate_size"}
    assert record["history"][0]["deviation"] <= 1e-5
    smaller = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert smaller < (source / "model.safetensors").stat().st_size


def test_half_precision_checkpoints_stay_half(tmp_path):
    source = tiny_model("bert", tmp_path / "half")
    from transformers import AutoModelForSequenceClassification

    AutoModelForSequenceClassification.from_pretrained(source).half().save_pretrained(source)
    model = open_model(str(source))
    assert model.dtype == torch.float32
    mask = select(rank(model, tmp_path), 0.5)
    assert stage.apply(model, mask, tmp_path / "out").deviation <= 1e-5
    assert open_model(str(tmp_path / "out")).stored_dtype == torch.float16


def test_the_same_mask_gives_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        pruned("bert", tmp_path / folder)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a/out" / file).read_bytes() == (tmp_path / "b/out" / file).read_bytes()


def test_a_finished_output_is_recognised_and_others_are_refused(tmp_path):
    source, mask, applied = pruned("bert", tmp_path)
    model = open_model(str(source))
    found = stage.existing(tmp_path / "out", model, mask)
    assert found.reused
    assert found.deviation == applied.deviation
    assert (found.params, found.dense_params) == (applied.params, applied.dense_params)
    assert applied.params < applied.dense_params
    mask.budget["flops"] = 0.123
    with pytest.raises(UsageError, match="another mask"):
        stage.existing(tmp_path / "out", model, mask)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="not made by optin"):
        stage.check_output(tmp_path / "mine", model)


def test_force_never_replaces_the_model_that_is_read(tmp_path):
    pruned("bert", tmp_path)
    with pytest.raises(UsageError, match="being read"):
        stage.check_output(tmp_path / "out", open_model(str(tmp_path / "out")))


def test_masks_of_other_models_are_refused(tmp_path):
    _, mask, _ = pruned("bert", tmp_path)
    other = tiny_model("bert", tmp_path / "other", seed=7)
    with pytest.raises(ArtefactError, match="other weights"):
        stage.check_fit(open_model(str(other)), mask)
    with pytest.raises(ArtefactError, match="other sites") as caught:
        stage.check_fit(open_model(str(tmp_path / "out")), mask)
    assert "select" in caught.value.hint
    with pytest.raises(ArtefactError, match="other sites") as caught:
        stage.check_fit(open_model(str(tmp_path / "out")), replace(mask, family="mine"))
    assert "'mine'" in caught.value.hint and "family=FILE.yaml" in caught.value.hint


def test_a_wrong_slice_is_caught_and_nothing_is_written(tmp_path, monkeypatch):
    model = open_model(str(saved_model("bert")))
    mask = select(rank(model, tmp_path), 0.5)
    right = stage.slice_model

    def wrong(module, anatomy, keep, **options):
        others = {n: [(i + 1) % mask.units[n] for i in k] for n, k in keep.items()}
        right(module, anatomy, others, **options)

    monkeypatch.setattr(stage, "slice_model", wrong)
    with pytest.raises(OptinError, match="differs from the masked one"):
        stage.apply(model, mask, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_calibration_data_that_is_gone_is_replaced_with_a_warning(name, tmp_path, caplog):
    model = open_model(str(saved_model(name)))
    mask = select(rank(model, tmp_path), 0.5)
    mask.calibration["spec"] = str(tmp_path / "gone")
    with caplog.at_level("WARNING", logger="optin"):
        applied = stage.apply(model, mask, tmp_path / "out")
    assert "can't be read again" in caplog.text
    assert applied.checked_on == ("builtin:prose" if name == "bert" else "noise")


def test_other_check_data_can_be_given(tmp_path):
    model = open_model(str(saved_model("bert")))
    mask = select(rank(model, tmp_path), 0.5)
    rows = DataSpec(str(tiny_text_csv(tmp_path / "more", seed=3)))
    batches = open_check(model, rows)
    assert stage.apply(model, mask, tmp_path / "out", batches).checked_on == rows.spec
    with pytest.raises(UsageError):
        open_check(open_model(str(saved_model("bert"))), DataSpec(str(tmp_path / "no")))


def test_random_masks_of_mpnet_keep_the_right_position_biases(tmp_path):
    """MPNet's encoder computes a bias for every dense head: after loading, each head must get its own."""
    model = open_model(str(saved_model("mpnet")))
    mask = select(rank(model, tmp_path), 1.0)
    rng = np.random.default_rng(0)
    for name in mask.keep:
        if name.endswith("heads"):
            mask.keep[name] = sorted(rng.choice(4, 2, replace=False).tolist())
    dense = open_model(str(saved_model("mpnet")))
    stage.apply(model, mask, tmp_path / "out")
    sliced = open_model(str(tmp_path / "out"))
    inputs = random_inputs(dense)
    with (
        torch.inference_mode(),
        masked(dense.module, dense.anatomy, masks_from_keep(dense.anatomy, mask.keep)),
    ):
        expected = dense.output(inputs)
    with torch.inference_mode():
        torch.testing.assert_close(sliced.output(inputs), expected, rtol=0, atol=1e-5)
