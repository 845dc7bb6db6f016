"""Data in every form that a caller may hold: the same rows give the same scores."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import optin_cli as optin
from optin_cli.data.batches import Batches
from optin_cli.data.examples import sample
from optin_cli.data.opening import as_data, open_batches

SETTINGS = {"samples": 16, "batch_size": 8}


@pytest.fixture
def model(bert, tokenizer):
    return optin.open_model(bert, processor=tokenizer)


@pytest.fixture
def file(texts, tmp_path):
    path = tmp_path / "train.csv"
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([["text"], *[[text] for text in texts]])
    return path


def assert_same_scores(one: optin.Ranking, other: optin.Ranking) -> None:
    for a, b in zip(one.sites, other.sites, strict=True):
        np.testing.assert_array_equal(a.score, b.score)


def test_rows_in_memory_score_as_those_of_a_file(model, file, texts):
    from datasets import Dataset, DatasetDict

    expected = optin.score(model, file, **SETTINGS)
    dataset = Dataset.from_dict({"text": texts})
    for data in (texts, dataset, [{"text": text} for text in texts], DatasetDict(train=dataset)):
        found = optin.score(model, data, **SETTINGS)
        assert_same_scores(found, expected)
        assert found.row_ids == expected.row_ids
        assert found.data["fingerprint"] == expected.data["fingerprint"]
        assert found.data["spec"] == "memory:Dataset"


def test_a_stream_in_memory_scores_as_one_of_a_file(model, file, texts):
    from datasets import Dataset

    expected = optin.score(model, optin.DataSpec(str(file), stream=True), **SETTINGS)
    found = optin.score(model, Dataset.from_dict({"text": texts}).to_iterable_dataset(), **SETTINGS)
    assert_same_scores(found, expected)


def test_batches_score_as_the_rows_they_were_made_of(model, file):
    """Handed out in another order, and read from a generator, which can be read once alone."""
    expected = optin.score(model, file, **SETTINGS)
    examples = sample(optin.DataSpec(str(file)), "text", 16, 0)
    ours = Batches(examples, model.processor, 8)
    found = optin.score(model, (dict(batch.inputs) for batch in reversed(list(ours))), **SETTINGS)
    assert_same_scores(found, expected)


def test_a_generator_is_read_no_further_than_it_must_be(model, batches):
    given = iter(batches)
    ranking = optin.score(model, given, samples=12)
    assert len(ranking.row_ids) == 12
    assert next(given) is batches[2]


def test_one_generator_serves_scoring_and_a_longer_compensation(model, batches):
    small = optin.prune(model, (batch for batch in batches), flops=0.6, samples=8)
    assert small.record.history[-1]["compensation"]["rows"] == 24


def test_a_loader_that_shuffles_gives_the_same_batches_at_every_pass(model, batches):
    ids = torch.cat(
        [torch.nn.functional.pad(b["input_ids"], (0, 24 - b["input_ids"].shape[1])) for b in batches]
    )
    loader = DataLoader(TensorDataset(ids), batch_size=8, shuffle=True)
    data = as_data(loader)
    one, other = (open_batches(data, model, 24, 8, 0) for _ in range(2))
    assert one.examples.fingerprint == other.examples.fingerprint
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.inputs["input_ids"], b.inputs["input_ids"])


def test_labels_that_come_with_batches_are_measured(model, batches, texts):
    from datasets import Dataset

    labels = [label for batch in batches for label in batch["labels"].tolist()]
    rows = Dataset.from_dict({"text": texts, "label": labels})
    expected = optin.evaluate(model, rows, batch_size=8)
    pairs = [({k: v for k, v in b.items() if k != "labels"}, b["labels"]) for b in batches]
    for data in (batches, pairs):
        found = optin.evaluate(model, data)
        assert found.metrics == pytest.approx(expected.metrics)
    assert expected.metrics["accuracy"] not in (0, 100)


def test_labels_serve_methods_that_need_them(model, batches):
    ranking = optin.score(model, batches, method="fisher", **SETTINGS)
    assert all((site.score >= 0).all() and site.score.any() for site in ranking.sites)
    with pytest.raises(optin.UsageError, match="needs labels"):
        unlabelled = [{k: v for k, v in b.items() if k != "labels"} for b in batches]
        optin.score(model, unlabelled, method="fisher", **SETTINGS)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([["a", "b"]], "2 parts|is a"),
        ([{"text": torch.zeros(2)}], "the model takes"),
        ([torch.zeros(2, 3), "text"], "is a str"),
        (iter([]), "no batch"),
        (TensorDataset(torch.zeros(2)), "TensorDataset is not data"),
        (7, "int is not data"),
        ({"text": ["a"]}, "dict is not data"),
    ],
)
def test_other_things_are_refused_in_a_sentence(model, data, said):
    with pytest.raises(optin.OptinError, match=said):
        optin.score(model, data, **SETTINGS)


def test_data_that_was_in_memory_has_to_be_given_again(model, batches, texts):
    mask = optin.select(optin.score(model, texts, **SETTINGS), flops=0.5)
    with pytest.raises(optin.InputError, match="was given in memory"):
        optin.apply(model, mask)


def test_batches_need_no_processor_and_rows_do(bert, batches, texts):
    assert optin.score(bert, batches, **SETTINGS).sites
    with pytest.raises(optin.InputError, match="without its tokenizer"):
        optin.score(bert, texts, **SETTINGS)
