"""Heads that no task covers, and weights under a prefix: nothing is dropped in silence."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from helpers.cli import FAST, run
from helpers.data import tiny_text_csv
from helpers.lazy import Lazy
from helpers.models import copy_of, opened, randomise, saved_model, shared_model
from helpers.runs import random_inputs, same_outputs
from helpers.tokenizers import save_tokenizer
from safetensors.torch import load_file, save_file

from optin_cli.data.opening import open_batches
from optin_cli.data.readers import masked_positions
from optin_cli.data.sources import DataSpec
from optin_cli.errors import InputError
from optin_cli.measure.evaluate import evaluate

transformers = Lazy("transformers")

TASKS = {
    "BertForMaskedLM": "masked-language-modeling",
    "BertForPreTraining": "masked-language-modeling",
    "BertForMultipleChoice": "hidden-states",
    "BertForNextSentencePrediction": "sequence-classification",
    "ElectraForPreTraining": "hidden-states",
    "RobertaForMaskedLM": "masked-language-modeling",
}
FAMILY = {"Bert": "bert", "Elec": "electra", "Robe": "roberta"}


def headed(class_name, folder):
    """A tiny model of the class, with its tokenizer."""
    name = FAMILY[class_name[:4]]
    config = transformers.AutoConfig.from_pretrained(saved_model(name))
    randomise(getattr(transformers, class_name)(config)).save_pretrained(folder)
    save_tokenizer(name, folder)
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """`prune` keeps its ranking, and what is unfinished of it, in the working directory."""
    monkeypatch.chdir(tmp_path)


def weights_of(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("class_name", TASKS)
def test_a_model_opens_with_its_head(class_name, tmp_path):
    model = opened(headed(class_name, tmp_path))
    assert (type(model.module).__name__, model.task.name) == (class_name, TASKS[class_name])
    expected = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(model.module.state_dict()[key], value) for key, value in expected.items())


@pytest.mark.parametrize(
    "class_name", ["BertForPreTraining", pytest.param("BertForMultipleChoice", marks=pytest.mark.slow)]
)
def test_a_pruned_model_keeps_the_class_and_the_head(class_name, tmp_path):
    model = headed(class_name, tmp_path / "m")
    data = tiny_text_csv(tmp_path)
    run(
        "prune",
        model,
        "--data",
        data,
        "--flops",
        0.6,
        "-o",
        tmp_path / "p",
        *FAST,
        "--ranking",
        tmp_path / "r.h5",
    )
    assert json.loads((tmp_path / "p/config.json").read_text())["architectures"] == [class_name]
    before, after = weights_of(model), weights_of(tmp_path / "p")
    assert set(after) == set(before)
    base = getattr(transformers, class_name).base_model_prefix
    head = [key for key in before if not key.startswith(f"{base}.")]
    assert head and all(torch.equal(before[key], after[key]) for key in head)
    measured = ("--data", data, "--split", "train", "--samples", 8, "--json")
    assert json.loads(run("eval", tmp_path / "p", "--baseline", model, *measured).stdout)["fidelity"]


def test_a_masked_language_model_is_measured_on_what_is_hidden(tmp_path):
    """The definition: every seventh token is replaced, and its own negative log likelihood counts."""
    folder = headed("BertForMaskedLM", tmp_path / "m")
    model = opened(folder)
    assert model.task.name == "masked-language-modeling"
    data = DataSpec(str(tiny_text_csv(tmp_path, rows=12, pairs=False, labels=None)))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    nats, right = [], []
    for text in open_batches(data, model, None, 4, 0).examples.rows["sentence"]:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        hidden = [i for i in masked_positions(ids.shape[1]) if ids[0, i] not in tokenizer.all_special_ids]
        masked = ids.clone()
        masked[0, hidden] = tokenizer.mask_token_id
        with torch.inference_mode():
            logits = model.module(masked).logits[0, hidden].log_softmax(-1)
        nats += [-float(row[i]) for row, i in zip(logits, ids[0, hidden], strict=True)]
        right += (logits.argmax(-1) == ids[0, hidden]).tolist()
    found = evaluate(model, open_batches(data, model, None, 4, 0)).metrics
    assert found["perplexity"] == pytest.approx(float(torch.tensor(nats).mean().exp()), rel=1e-5)
    assert found["accuracy"] == pytest.approx(100 * sum(right) / len(right))


@pytest.mark.parametrize("class_name", ["BertForMaskedLM", "BertForPreTraining"])
def test_words_are_predicted_where_they_are_masked_alone(class_name, tmp_path):
    model = opened(headed(class_name, tmp_path))
    inputs, given = random_inputs(model, tokens=50), []
    rows = masked_positions(50)
    layer = model.module.get_output_embeddings()
    handle = layer.register_forward_hook(lambda _, __, output: given.append(output.shape[1]))
    with torch.inference_mode():
        found = model.full_output(inputs)
        handle.remove()
        result = model.module(**inputs)
    assert given == [len(rows)]
    whole = result.logits if hasattr(result, "logits") else result.prediction_logits
    torch.testing.assert_close(found, whole[:, rows])


def test_a_tokenizer_without_a_mask_is_refused_with_the_way_out(tmp_path):
    folder = headed("BertForMaskedLM", tmp_path / "m")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k != "mask_token"})
    )
    arguments = ["prune", folder, "--data", tiny_text_csv(tmp_path), "--flops", 0.6, "-o", tmp_path / "p"]
    assert "no mask token" in run(*arguments, *FAST, code=1).stderr


def without_architecture(tmp_path):
    folder = copy_of(saved_model("bert"), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_classifier_whose_config_names_no_architecture_is_refused_naming_its_head(tmp_path):
    folder = without_architecture(tmp_path)
    with pytest.raises(InputError, match=r"names no architecture.*classifier\.bias") as caught:
        opened(folder)
    assert "sequence-classification" in caught.value.hint
    assert same_outputs(opened(folder, task="sequence-classification"), shared_model("bert"))


def test_a_head_that_is_left_out_on_request_is_named(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "optin"):
        opened(without_architecture(tmp_path), task="embedding")
    assert "2 weights are left out (classifier.bias, classifier.weight)" in caplog.text


PREFIXES = ["module.", "_orig_mod.", "model.", "module._orig_mod.", "net."]


@pytest.mark.parametrize(
    ("name", "prefix"),
    # transformers renames the weights of a ViT as it reads them: only usual prefixes are known there
    [
        *((name, prefix) for name in ("bert", "llama") for prefix in PREFIXES),
        *(("vit", p) for p in PREFIXES[:3]),
    ],
)
def test_weights_under_a_prefix_are_those_without_it(name, prefix, tmp_path, caplog):
    folder = copy_of(saved_model(name), tmp_path / "m")
    weights = {prefix + key: value for key, value in weights_of(folder).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level(logging.INFO, "optin"):
        model = opened(folder)
    itself = (name, prefix) == ("llama", "model.")  # transformers does it
    assert itself or f"{prefix!r}: they are read without it" in caplog.text
    assert same_outputs(model, shared_model(name))
    model.module.save_pretrained(tmp_path / "saved")
    assert set(weights_of(tmp_path / "saved")) == set(weights_of(saved_model(name)))


@pytest.mark.parametrize("prefix", ["module.", "model.", "net.model."])
def test_a_checkpoint_for_timm_under_a_prefix_is_that_without_it(prefix, tmp_path):
    folder = saved_model("timm-vit")
    weights = {prefix + key: value for key, value in weights_of(folder).items()}
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "last.ckpt")
    target = copy_of(folder, tmp_path / "m")
    (target / "model.safetensors").unlink()
    torch.save({"state_dict": weights, "epoch": 3}, target / "pytorch_model.bin")
    assert same_outputs(opened(target), shared_model("timm-vit"))
