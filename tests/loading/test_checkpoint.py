"""Opening models: every layout of weights, every unusable one."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.families import ALL, IMAGE_FAMILIES, TEXT_FAMILIES, TIMM_NAME
from helpers.models import (
    copy_of,
    in_dtype,
    new_model,
    new_timm_vit,
    opened,
    saved_model,
    shared_model,
    tiny_model,
)
from helpers.runs import outputs, random_inputs
from safetensors.torch import load_file, save_file

from optin_cli.architectures.families import Family, SiteTable
from optin_cli.errors import InputError, UnknownArchitecture, UsageError
from optin_cli.loading.checkpoint import OpenModel, open_model
from optin_cli.loading.processors import ImageProcessor, TextProcessor

# opening a directory


@pytest.mark.parametrize("name", ALL)
def test_an_opened_model_computes_what_the_saved_one_did(name):
    original = new_timm_vit() if name == "timm-vit" else new_model(name)
    model = shared_model(name)
    inputs = random_inputs(model)
    assert torch.equal(outputs(model, original, inputs), outputs(model, model.module, inputs))


@pytest.mark.parametrize("name", ALL)
def test_an_opened_model_is_frozen_and_in_eval_mode(name):
    module = shared_model(name).module
    assert not any(m.training for m in module.modules())
    assert not any(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("name", ALL)
def test_the_processor_comes_from_the_directory(name):
    processor = shared_model(name).processor
    assert isinstance(processor, TextProcessor if name in TEXT_FAMILIES else ImageProcessor)


@pytest.mark.parametrize(
    ("head", "task"),
    [
        ("encoder", "embedding"),
        ("classifier", "sequence-classification"),
        ("tagger", "token-classification"),
        ("reader", "question-answering"),
    ],
)
@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_the_head_is_found_from_the_architecture(name, head, task):
    assert shared_model(name, head).task.name == task


@pytest.mark.parametrize(("head", "task"), [("encoder", "embedding"), ("classifier", "image-classification")])
@pytest.mark.parametrize("name", IMAGE_FAMILIES)
def test_an_image_model_classifies_or_embeds(name, head, task):
    assert shared_model(name, head).task.name == task


def test_one_logit_is_a_regression(tmp_path):
    assert opened(tiny_model("bert", tmp_path, num_labels=1)).task.term == "squares"
    assert shared_model("bert").task.term == "kl"


def test_dense_facts_are_those_of_the_model():
    model = shared_model("bert")
    assert model.dense["id"] == model.spec
    assert model.dense["digest"] == model.digest
    assert model.dense["params"] == sum(p.numel() for p in model.module.parameters())
    tokens = 7
    macs = model.dense["macs_per_token"] * tokens + model.dense["macs_per_pair"] * tokens**2
    assert macs == model.anatomy.macs(tokens)


# digests


def test_the_digest_changes_with_one_weight(tmp_path):
    folder = copy_of(saved_model("bert"), tmp_path)
    assert opened(folder).digest == shared_model("bert").digest
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert opened(folder).digest != shared_model("bert").digest


def test_the_digest_does_not_depend_on_where_the_folder_is(tmp_path):
    moved = copy_of(saved_model("vit"), tmp_path / "elsewhere")
    assert opened(moved).digest == shared_model("vit").digest


def pretrained_timm(monkeypatch, seed: int) -> OpenModel:
    """`timm:NAME` with `seed` standing in for the weights that timm would download."""
    import timm

    weights = new_timm_vit(seed=seed)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **args: weights)
    return opened(f"timm:{TIMM_NAME}")


def test_a_timm_model_made_by_name_has_a_digest_of_its_weights(monkeypatch):
    digests = []
    for seed in (1, 1, 2):
        with monkeypatch.context() as patch:
            digests.append(pretrained_timm(patch, seed).digest)
    assert digests[0] == digests[1] != digests[2]


# device and dtype


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["bert", "timm-vit"])
def test_half_precision_checkpoints_compute_in_float32_on_cpu(name, stored, tmp_path):
    folder = in_dtype(saved_model(name), tmp_path, stored)
    model = opened(folder)
    assert {p.dtype for p in model.module.parameters()} == {torch.float32}
    assert model.stored_dtype == getattr(torch, stored)
    assert outputs(model, model.module, random_inputs(model)).isfinite().all()


@pytest.mark.parametrize("name", ["bert", "timm-vit"])
def test_a_dtype_can_be_asked_for(name):
    model = opened(saved_model(name), dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert model.stored_dtype == torch.float32


def test_an_unknown_dtype_lists_the_known_ones():
    with pytest.raises(UsageError, match=r"'int4'(.|\n)*float16"):
        opened(saved_model("bert"), dtype="int4")


def test_an_unknown_device_is_a_usage_error():
    with pytest.raises(UsageError, match="'abacus'"):
        open_model(str(saved_model("bert")), device="abacus")


def test_cuda_where_there_is_none_is_a_usage_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="device='cpu'"):
        open_model(str(saved_model("bert")), device="cuda")


def test_auto_is_the_cpu_where_there_is_no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert open_model(str(saved_model("bert")), device="auto").device.type == "cpu"


def test_an_unknown_model_type_is_an_input_error(tmp_path):
    folder = copy_of(saved_model("bert"), tmp_path)
    (folder / "config.json").write_text(json.dumps({"model_type": "abacus"}))
    with pytest.raises(InputError, match="abacus"):
        opened(folder)


def test_a_known_library_model_without_a_family_names_the_page(tmp_path):
    import transformers

    config = transformers.BloomConfig(hidden_size=8, n_layer=1, n_head=1, vocab_size=5)
    transformers.BloomModel(config).save_pretrained(tmp_path)
    with pytest.raises(UnknownArchitecture, match=r"'bloom'(.|\n)*docs/anatomy\.md"):
        opened(tmp_path)


def test_a_family_can_be_given_instead_of_the_registered_one():
    neurons = SiteTable("neurons", shared_model("bert").family.sites[1].producers, "output.dense")
    family = Family("mine", (), "encoder.layer", (neurons,))
    model = opened(saved_model("bert"), family=family)
    assert [site.kind for site in model.anatomy] == ["neurons"] * 3


@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_a_directory_without_a_tokenizer_opens_but_says_so_when_asked_for_it(name, tmp_path):
    """transformers makes up an empty tokenizer for some: every word would be unknown."""
    model = opened(copy_of(saved_model(name), tmp_path))
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match=r"tokenizer(.|\n)*tokenizer\.json"):
        _ = model.processor
