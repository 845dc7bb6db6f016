"""Opening models: every layout of weights, every unusable one."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

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
from helpers.runs import outputs, random_inputs, same_outputs
from safetensors.torch import load_file, save_file

from optin_cli.errors import InputError, UnknownArchitecture, UsageError
from optin_cli.models.checkpoint import OpenModel, open_model
from optin_cli.models.families import Family, SiteTable
from optin_cli.models.processors import ImageProcessor, TextProcessor

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


# --task


@pytest.mark.parametrize("name", ALL)
def test_a_classifier_opens_as_an_embedding_model_on_request(name):
    model = opened(saved_model(name), task="embedding")
    inputs = random_inputs(model)
    vectors = outputs(model, model.module, inputs)
    assert model.task.name == "embedding"
    assert vectors.shape == (3, 48 if name == "timm-vit" else 32)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_embeddings_of_a_classifier_are_those_of_its_encoder(name, tmp_path):
    """The head is left out, the encoder's weights are not."""
    headed = shared_model(name)
    headed.module.base_model.save_pretrained(tmp_path)
    assert same_outputs(opened(saved_model(name), task="embedding"), opened(tmp_path))


def test_naming_the_task_it_has_changes_nothing():
    assert same_outputs(opened(saved_model("bert"), task="sequence-classification"), shared_model("bert"))


@pytest.mark.parametrize("task", ["sequence-classification", "token-classification", "question-answering"])
@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_a_head_without_weights_is_refused_naming_them(name, task):
    with pytest.raises(InputError, match=rf"no weights for .*(classifier|qa_outputs)(.|\n)*{task}"):
        opened(saved_model(name, "encoder"), task=task)


def test_an_encoder_without_one_of_its_weights_is_refused_naming_it(tmp_path):
    folder = copy_of(saved_model("bert", "encoder"), tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"encoder\.layer\.1\.output\.dense\.weight") as caught:
        opened(folder)
    assert "incomplete" in caught.value.hint  # another task would not help


def test_a_classifier_without_the_pooler_that_its_head_reads_is_refused(tmp_path):
    folder = copy_of(saved_model("bert"), tmp_path)
    weights = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in weights.items() if "pooler" not in key}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"bert\.pooler"):
        opened(folder)


@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_an_encoder_needs_no_pooler_and_opens_the_same_each_time(name):
    """The heads of some families read no pooler, so their checkpoints have none: nothing random may take its place."""
    one, other = (opened(saved_model(name), task="embedding").module.state_dict() for _ in range(2))
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def test_an_unknown_task_lists_the_known_ones():
    with pytest.raises(UsageError, match=r"'poetry'(.|\n)*question-answering"):
        opened(saved_model("bert"), task="poetry")


@pytest.mark.parametrize(
    ("name", "task"),
    [("bert", "image-classification"), ("vit", "question-answering"), ("timm-vit", "token-classification")],
)
def test_a_task_that_the_architecture_can_not_do_is_a_usage_error(name, task):
    with pytest.raises(UsageError, match=f"can't do {task}"):
        opened(saved_model(name), task=task)


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
    with pytest.raises(UsageError, match="--device cpu"):
        open_model(str(saved_model("bert")), device="cuda")


def test_auto_is_the_cpu_where_there_is_no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert open_model(str(saved_model("bert")), device="auto").device.type == "cpu"


# layouts of weights


def test_sharded_safetensors_load(tmp_path):
    folder = copy_of(saved_model("bert"), tmp_path)
    (folder / "model.safetensors").unlink()
    new_model("bert").save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert same_outputs(opened(folder), shared_model("bert"))


def test_a_missing_shard_is_an_input_error(tmp_path):
    new_model("bert").save_pretrained(tmp_path, max_shard_size="40KB")
    sorted(tmp_path.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(InputError, match="model-00002"):
        opened(tmp_path)


def with_pickled_weights(folder: Path, target: Path) -> Path:
    copy_of(folder, target)
    torch.save(load_file(target / "model.safetensors"), target / "pytorch_model.bin")
    (target / "model.safetensors").unlink()
    return target


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_pickled_tensors_load(name, tmp_path):
    assert same_outputs(opened(with_pickled_weights(saved_model(name), tmp_path)), shared_model(name))


def test_sharded_pickled_tensors_load(tmp_path):
    folder = copy_of(saved_model("bert"), tmp_path)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    keys = sorted(weights)
    index = {}
    for number, part in enumerate((keys[::2], keys[1::2]), start=1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({key: weights[key] for key in part}, folder / file)
        index.update(dict.fromkeys(part, file))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert same_outputs(opened(folder), shared_model("bert"))


class Malicious:
    """Unpickling it makes a file: proof that code ran."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return Path.touch, (self.proof,)


def malicious_weights(path: Path, proof: Path) -> None:
    torch.save({"weight": torch.zeros(1), "code": Malicious(proof)}, path)


def test_the_malicious_pickle_of_these_tests_does_run_code(tmp_path):
    malicious_weights(tmp_path / "w.bin", tmp_path / "proof")
    torch.load(tmp_path / "w.bin", weights_only=False)
    assert (tmp_path / "proof").exists()


def test_a_malicious_pickle_is_refused_and_never_run(tmp_path):
    folder = with_pickled_weights(saved_model("bert"), tmp_path / "model")
    malicious_weights(folder / "pytorch_model.bin", tmp_path / "proof")
    with pytest.raises(InputError, match="hold more than tensors"):
        opened(folder)
    assert not (tmp_path / "proof").exists()


def test_a_malicious_old_style_pickle_is_refused_and_never_run(tmp_path):
    folder = with_pickled_weights(saved_model("bert"), tmp_path / "model")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Malicious(tmp_path / "proof")}))
    with pytest.raises(InputError):
        opened(folder)
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("suffix", ["pth", "bin"])
def test_a_malicious_timm_checkpoint_is_refused_and_never_run(suffix, tmp_path):
    path = tmp_path / f"weights.{suffix}"
    malicious_weights(path, tmp_path / "proof")
    with pytest.raises(InputError, match="hold more than tensors"):
        opened(f"timm:{TIMM_NAME}?checkpoint={path}")
    assert not (tmp_path / "proof").exists()


def test_a_malicious_pickle_beside_safetensors_is_not_even_read(tmp_path):
    folder = copy_of(saved_model("bert"), tmp_path / "model")
    malicious_weights(folder / "pytorch_model.bin", tmp_path / "proof")
    assert same_outputs(opened(folder), shared_model("bert"))
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.99])
@pytest.mark.parametrize("name", ["bert", "timm-vit"])
def test_truncated_safetensors_are_an_input_error(name, share, tmp_path):
    folder = copy_of(saved_model(name), tmp_path)
    truncate(folder / "model.safetensors", share)
    with pytest.raises(InputError, match=str(folder)):
        opened(folder)


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_truncated_pickles_are_an_input_error(share, tmp_path):
    folder = with_pickled_weights(saved_model("bert"), tmp_path)
    truncate(folder / "pytorch_model.bin", share)
    with pytest.raises(InputError, match=str(folder)):
        opened(folder)


def truncate(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def test_weights_of_another_size_than_the_config_says_are_an_input_error(tmp_path):
    folder = copy_of(saved_model("bert"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(InputError, match=str(folder)) as caught:
        opened(folder)
    told = caught.value.what
    assert (
        "9 of another shape: bert.encoder.layer.0.intermediate.dense.bias (64 in the file, 48 in the model)"
        in told
    )
    assert "dense.weight (64x32 in the file, 48x32 in the model)" in told
    assert "config.json" in caught.value.hint


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
