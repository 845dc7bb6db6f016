"""Poolings against their formulas, and against sentence-transformers where that is installed."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from helpers.models import saved_model
from helpers.pruning import sliced_copy
from helpers.sentences import folder_of

from optin_cli.errors import InputError
from optin_cli.loading.checkpoint import open_model
from optin_cli.tasks.pooling import POOLINGS, pooled, read_pooling

TEXTS = ["good", "the film is very good", "dull a film", "fine"]
KEEP = {"blocks.0.heads": [], "blocks.1.heads": [1, 3], "blocks.1.neurons": [5, 6, 60]}


def by_hand(tokens: torch.Tensor, pooling: str) -> torch.Tensor:
    """The vector of the real tokens (n, d) of one text, by its definition."""
    weights = torch.arange(1, len(tokens) + 1)[:, None]
    return {
        "mean": tokens.mean(0),
        "mean_sqrt_len_tokens": tokens.sum(0) / len(tokens) ** 0.5,
        "weightedmean": (tokens * weights).sum(0) / weights.sum(),
        "cls": tokens[0],
        "lasttoken": tokens[-1],
        "max": tokens.max(0).values,
    }[pooling]


@pytest.mark.parametrize("left", [False, True], ids=["padded right", "padded left"])
@pytest.mark.parametrize("pooling", [*POOLINGS, "cls+max"])
def test_a_pooling_is_its_formula_on_the_real_tokens(pooling, left):
    hidden = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    lengths = [5, 3, 1]
    mask = torch.zeros(3, 5, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, 5 - length :] = 1 if left else 0
        mask[row, :length] = mask[row, :length] if left else 1
    found = pooled(hidden, mask, pooling)
    for row in range(3):
        tokens = hidden[row][mask[row].bool()]
        torch.testing.assert_close(
            found[row], torch.cat([by_hand(tokens, name) for name in pooling.split("+")])
        )
    torch.testing.assert_close(pooled(hidden, None, pooling), pooled(hidden, torch.ones(3, 5), pooling))


@pytest.mark.parametrize(
    ("settings", "pooling"),
    [
        ({"pooling_mode": "lasttoken"}, "lasttoken"),
        ({"pooling_mode": ["cls", "max"]}, "cls+max"),
        ({"pooling_mode_cls_token": False, "pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_weightedmean_tokens": True}, "weightedmean"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "cls+mean"),
        ({}, "mean"),
    ],
)
def test_the_pooling_is_the_one_that_modules_json_names(settings, pooling, tmp_path):
    folder = folder_of(tmp_path / "m", settings, where="1_Elsewhere")
    assert open_model(str(folder)).task.pooling == pooling


@pytest.mark.parametrize("trained_as", ["BertForMaskedLM", "BertForSequenceClassification"])
def test_a_sentence_encoder_embeds_whatever_it_was_trained_as(trained_as, tmp_path):
    """all-mpnet-base-v2's config names the class of its pretraining, and its weights have no such head."""
    folder = folder_of(tmp_path / "m", {"pooling_mode": "cls"})
    plain = open_model(str(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [trained_as]}))
    found = open_model(str(folder))
    assert (found.task.name, found.task.pooling) == ("embedding", "cls")
    assert type(found.module) is type(plain.module)
    assert all(
        torch.equal(a, b) for a, b in zip(found.module.parameters(), plain.module.parameters(), strict=True)
    )


def test_a_head_that_a_sentence_encoder_still_has_is_left_out(tmp_path, caplog):
    folder = folder_of(tmp_path / "m", {})
    config, weights = folder / "config.json", folder / "model.safetensors"
    config.write_text((saved_model("bert") / "config.json").read_text())  # a classifier
    weights.write_bytes((saved_model("bert") / "model.safetensors").read_bytes())
    with caplog.at_level(logging.WARNING, "optin"):
        assert open_model(str(folder)).task.name == "embedding"
    assert "weights are left out" in caplog.text and "classifier" in caplog.text


def test_a_pooling_that_is_not_known_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="attention_pooling"):
        read_pooling(folder_of(tmp_path / "m", {"pooling_mode": "attention_pooling"}))


def test_other_modules_behind_the_pooling_are_warned_of(tmp_path, caplog):
    folder = folder_of(tmp_path / "m", {}, others=("Dense", "Normalize"))
    with caplog.at_level(logging.WARNING, "optin"):
        read_pooling(folder)
    assert "Dense" in caplog.text and "Normalize" not in caplog.text


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken", "max", "weightedmean"])
def test_a_pruned_model_opens_in_sentence_transformers(pooling, tmp_path):
    """With optin's embeddings, and without code of optin: modules.json, pooling and normalisation go along."""
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer

    dense = folder_of(tmp_path / "dense", {"pooling_mode": pooling}, others=("Normalize",))
    sliced_copy(dense, tmp_path / "m", KEEP)
    sentences = SentenceTransformer(str(tmp_path / "m"), trust_remote_code=True, device="cpu")
    assert len(sentences) == 3
    model = open_model(str(tmp_path / "m"))
    processor = model.processor
    with torch.inference_mode():
        found = model.output(processor.pad(processor.tokenize(TEXTS)))[:, 0]
    torch.testing.assert_close(torch.tensor(sentences.encode(TEXTS)), found, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="trust_remote_code"):
        SentenceTransformer(str(tmp_path / "m"), device="cpu")
