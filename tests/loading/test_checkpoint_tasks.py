"""Opening a model as another task: `--task`, and heads that lack their weights."""

from __future__ import annotations

import pytest
import torch
from helpers.families import ALL, TEXT_FAMILIES
from helpers.models import copy_of, opened, saved_model, shared_model
from helpers.runs import outputs, random_inputs, same_outputs
from safetensors.torch import load_file, save_file

from optin_cli.errors import InputError, UsageError


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
