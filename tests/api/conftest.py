"""A tiny model and data as a caller holds them."""

from __future__ import annotations

import pytest
import torch
from helpers.data import sentences
from helpers.models import new_model
from helpers.tokenizers import save_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer("bert", folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def bert():
    """A BERT classifier of two blocks, in training mode, as it comes from a training loop."""
    return new_model("bert", num_hidden_layers=2).train()


@pytest.fixture(scope="session")
def texts():
    return sentences(24, seed=1)


@pytest.fixture(scope="session")
def batches(tokenizer, texts):
    """Three batches of eight texts with labels, as a collator makes them."""
    found = []
    for start in range(0, len(texts), 8):
        batch = dict(tokenizer(texts[start : start + 8], padding=True, return_tensors="pt"))
        found.append({**batch, "labels": torch.tensor([0, 1] * 4)})
    return found
