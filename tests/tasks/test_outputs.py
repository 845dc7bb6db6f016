"""Outputs of each task: one shape for all, and padding that never counts."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.families import TEXT_FAMILIES
from helpers.models import shared_model, tiny_model
from helpers.runs import random_inputs

from optin_cli.loading.checkpoint import open_model
from optin_cli.tasks.embedding import Embedding

ROWS = {"encoder": (3, 1, 32), "classifier": (3, 1, 2), "tagger": (3, 9, 2), "reader": (3, 2, 9)}


@pytest.mark.parametrize(("head", "shape"), ROWS.items(), ids=ROWS)
def test_every_task_gives_rows_of_classes_with_a_weight_each(head, shape):
    model = shared_model("bert", head)
    inputs = random_inputs(model)
    with torch.no_grad():
        assert model.output(inputs).shape == shape
    assert model.task.row_weights(inputs).shape == shape[:2]


def test_padding_tokens_of_a_tagger_weigh_nothing():
    model = shared_model("bert", "tagger")
    inputs = random_inputs(model)
    assert torch.equal(model.task.row_weights(inputs), inputs["attention_mask"].float())


def test_an_answer_is_never_in_the_padding():
    model = shared_model("bert", "reader")
    inputs = random_inputs(model)
    with torch.no_grad():
        shares = model.output(inputs).softmax(dim=-1)
    padding = (inputs["attention_mask"] == 0)[:, None, :].expand_as(shares)
    assert padding.any()
    assert shares[padding].max() == 0


@pytest.mark.parametrize("head", ["encoder", "classifier"])
@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_more_padding_changes_no_output(name, head):
    model = shared_model(name, head)
    inputs = random_inputs(model)
    pad = model.module.config.pad_token_id
    longer = {
        key: torch.nn.functional.pad(value, (0, 4), value=pad if key == "input_ids" else 0)
        for key, value in inputs.items()
    }
    with torch.no_grad():
        torch.testing.assert_close(model.output(longer), model.output(inputs), rtol=0, atol=1e-5)


def embedding_of(hidden: torch.Tensor, mask: torch.Tensor | None, pooling: str) -> torch.Tensor:
    inputs = {"x": hidden} if mask is None else {"x": hidden, "attention_mask": mask}
    return Embedding(pooling=pooling).output(lambda x, attention_mask=None: x, inputs)[:, 0]


def test_mean_pooling_is_the_mean_of_the_real_tokens():
    hidden = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    for row, tokens in enumerate((4, 2)):
        mean = hidden[row, :tokens].mean(dim=0)
        torch.testing.assert_close(embedding_of(hidden, mask, "mean")[row], mean / mean.norm())


def test_mean_pooling_without_a_mask_takes_all_tokens():
    hidden = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(2, 4, dtype=torch.long)
    torch.testing.assert_close(embedding_of(hidden, None, "mean"), embedding_of(hidden, ones, "mean"))


def test_cls_pooling_is_the_first_token():
    hidden = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    first = hidden[:, 0] / hidden[:, 0].norm(dim=1, keepdim=True)
    torch.testing.assert_close(embedding_of(hidden, torch.ones(2, 4), "cls"), first)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_pooling_is_read_from_the_sentence_transformers_files(pooling, tmp_path):
    folder = tiny_model("bert", tmp_path, "encoder")
    (folder / "1_Pooling").mkdir()
    settings = {"pooling_mode_cls_token": pooling == "cls", "pooling_mode_mean_tokens": pooling == "mean"}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    assert open_model(str(folder), device="cpu").task.pooling == pooling


def test_without_such_files_pooling_is_the_mean():
    assert shared_model("bert", "encoder").task.pooling == "mean"
