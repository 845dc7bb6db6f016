"""Evaluation of regressions and embeddings against scipy and brute force."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from helpers.data import tiny_image_folder, tiny_text_csv
from helpers.evaluation import (
    CLOSE,
    batches,
    columns,
    embed_one_by_one,
    labelled,
    one_by_one,
    other_model,
    special_model,
)
from helpers.lazy import Lazy
from helpers.models import shared_model

from optin_cli.data.readers import SIDES
from optin_cli.errors import UsageError
from optin_cli.measure.evaluate import evaluate, gate
from optin_cli.tasks import metrics

stats = Lazy("scipy.stats")


def test_regression_is_scipys(tmp_path):
    model = special_model(num_labels=1)
    module = copy.deepcopy(model.module)
    module.classifier.bias.data += 0.25
    moved = dataclasses.replace(model, module=module)
    path = tiny_text_csv(tmp_path, labels="score")
    result = evaluate(moved, batches(model, path), model)
    first, second, labels = columns(path, "sentence1", "sentence2", "label")
    values, truth = one_by_one(model, first, second)[:, 0], [float(label) for label in labels]
    assert result.metrics == pytest.approx(
        {
            "pearson": 100 * stats.pearsonr(values, truth).statistic,
            "spearman": 100 * stats.spearmanr(values, truth).statistic,
            "mse": np.square(values.numpy() + 0.25 - truth).mean(),
        },
        abs=CLOSE,
    )
    assert result.main == "spearman"
    assert result.fidelity == pytest.approx({"mean_abs_difference": 0.25}, rel=1e-4)
    assert result.drop == pytest.approx(0, abs=CLOSE)


def test_regression_without_labels_has_no_drop(tmp_path):
    model = special_model(num_labels=1)
    path = tiny_text_csv(tmp_path, labels=None)
    result = evaluate(model, batches(model, path), model)
    assert result.drop is None
    with pytest.raises(UsageError, match="max_drop"):
        gate(result, 100)


@pytest.mark.parametrize("batch_size", [1, 9])
def test_pairs_of_embeddings_are_scipys(tmp_path, batch_size):
    model, baseline = shared_model("bert", "encoder"), other_model("bert", "encoder")
    path = tiny_text_csv(tmp_path, labels="score", rows=25)
    result = evaluate(model, batches(model, path, batch_size, reader=SIDES), baseline)
    first, second, labels = columns(path, "sentence1", "sentence2", "label")
    truth = [float(label) for label in labels]
    for m, found in ((model, result.metrics), (baseline, result.baseline_metrics)):
        a, b = embed_one_by_one(m, first), embed_one_by_one(m, second)
        cosine = torch.nn.functional.cosine_similarity(a, b)
        assert found == pytest.approx(
            {
                "pearson": 100 * stats.pearsonr(cosine, truth).statistic,
                "spearman": 100 * stats.spearmanr(cosine, truth).statistic,
            },
            abs=CLOSE,
        )
    texts = [text for pair in zip(first, second, strict=True) for text in pair]
    ours, dense = embed_one_by_one(model, texts), embed_one_by_one(baseline, texts)
    expected = torch.nn.functional.cosine_similarity(ours, dense).mean()
    assert result.fidelity["cosine"] == pytest.approx(100 * float(expected), abs=CLOSE)
    assert result.fidelity["top10_overlap"] == pytest.approx(brute_overlap(ours, dense, 10), abs=0.5)
    assert (result.examples, result.main) == (50, "spearman")
    assert result.drop == pytest.approx(result.baseline_metrics["spearman"] - result.metrics["spearman"])


@pytest.mark.parametrize("pairs", [False, True])
def test_embeddings_without_pairs_have_fidelity_only(tmp_path, pairs):
    model = shared_model("bert", "encoder")
    path = tiny_text_csv(tmp_path, labels="score", pairs=pairs)
    result = evaluate(model, batches(model, path), other_model("bert", "encoder"))
    assert (result.metrics, result.examples) == ({}, 60)
    assert result.drop == pytest.approx(100 - result.fidelity["cosine"])
    assert result.drop > 0.1


def test_an_image_encoder_has_fidelity(tmp_path):
    model = shared_model("timm-vit", "encoder")
    tiny_image_folder(tmp_path, 12)
    result = evaluate(model, batches(model, tmp_path, 5), model)
    assert result.fidelity == pytest.approx({"cosine": 100, "top10_overlap": 100})


def test_one_example_has_no_neighbours(tmp_path):
    model = shared_model("bert", "encoder")
    result = evaluate(model, batches(model, labelled(tmp_path, [1])), model)
    assert result.fidelity == pytest.approx({"cosine": 100})


def brute_overlap(first: torch.Tensor, second: torch.Tensor, k: int) -> float:
    def neighbours(vectors: torch.Tensor, i: int) -> set[int]:
        others = [j for j in range(len(vectors)) if j != i]
        cosine = [float(torch.nn.functional.cosine_similarity(vectors[i], vectors[j], dim=0)) for j in others]
        return {others[j] for j in np.argsort(cosine)[-k:]}

    shares = [len(neighbours(first, i) & neighbours(second, i)) / k for i in range(len(first))]
    return 100 * float(np.mean(shares))


@pytest.mark.parametrize("chunk", [1, 7, 40, 1000])
def test_neighbour_overlap_is_brute_force(chunk):
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(40, 6, generator=generator) * torch.rand(40, 1, generator=generator)
    second = first + 0.5 * torch.randn(40, 6, generator=generator)
    found = metrics.neighbour_overlap(first, second, k=5, chunk=chunk)
    assert found == pytest.approx(brute_overlap(first, second, 5))
    assert 20 < found < 90


def test_with_few_examples_all_others_are_neighbours():
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn(2, 5, 3, generator=generator)
    assert metrics.neighbour_overlap(first, second, k=10) == 100


def test_a_model_that_always_says_the_same_correlates_with_nothing(tmp_path, caplog):
    model = special_model(num_labels=1)
    module = copy.deepcopy(model.module)
    module.classifier.weight.data.zero_()
    data = batches(model, labelled(tmp_path, [0.1, 0.5, 1.0, 0.7]))
    result = evaluate(dataclasses.replace(model, module=module), data, model)
    assert (result.metrics["pearson"], result.metrics["spearman"]) == (0, 0)
    assert result.drop == result.baseline_metrics["spearman"]
    assert "same value for every example" in caplog.text
