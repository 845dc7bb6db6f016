"""Evaluation of classifiers, taggers and readers against scikit-learn and scipy, one example at a time."""

from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from helpers.data import sentences, tiny_image_folder, tiny_text_csv
from helpers.evaluation import (
    batches,
    columns,
    json_lines,
    labelled,
    one_by_one,
    other_model,
    special_model,
    tagged,
)
from helpers.lazy import Lazy
from helpers.models import shared_model, tiny_model

from optin_cli.data.images import decode
from optin_cli.loading.checkpoint import open_model
from optin_cli.measure.evaluate import evaluate, gate
from optin_cli.tasks.answering import QUESTION

oracle = Lazy("sklearn.metrics")
stats = Lazy("scipy.stats")


@pytest.mark.parametrize("batch_size", [1, 7, pytest.param(100, marks=pytest.mark.slow)])
def test_binary_classification_is_sklearns(tmp_path, batch_size):
    model, baseline = shared_model("bert"), other_model()
    path = tiny_text_csv(tmp_path)
    result = evaluate(model, batches(model, path, batch_size), baseline)
    first, second, labels = columns(path, "sentence1", "sentence2", "label")
    truth = [int(label) for label in labels]
    guess, dense = (one_by_one(m, first, second) for m in (model, baseline))
    for found, logits in ((result.metrics, guess), (result.baseline_metrics, dense)):
        predicted = logits.argmax(-1)
        assert found == pytest.approx(
            {
                "accuracy": 100 * oracle.accuracy_score(truth, predicted),
                "f1": 100 * oracle.f1_score(truth, predicted),
                "matthews": 100 * oracle.matthews_corrcoef(truth, predicted),
            }
        )
    assert (result.task, result.examples, result.main) == ("sequence-classification", 60, "accuracy")
    assert result.drop == pytest.approx(result.baseline_metrics["accuracy"] - result.metrics["accuracy"])
    same = (guess.argmax(-1) == dense.argmax(-1)).double().mean()
    assert 0 < same < 1
    p, q = dense.double().softmax(-1), guess.double().softmax(-1)
    divergence = np.mean([stats.entropy(a, b) for a, b in zip(p, q, strict=True)])
    assert result.fidelity == pytest.approx({"agreement": 100 * float(same), "kl": divergence}, rel=1e-4)


def test_labels_by_name_are_the_models_own(tmp_path):
    """`label2id` maps names, here against the alphabet."""
    names = {"label2id": {"positive": 0, "negative": 1}, "id2label": {0: "positive", 1: "negative"}}
    model = open_model(str(tiny_model("bert", tmp_path / "model", **names)), device="cpu")
    by_name = evaluate(model, batches(model, tiny_text_csv(tmp_path, labels="name", name="a.csv")))
    by_number = evaluate(model, batches(model, tiny_text_csv(tmp_path, labels="class", name="b.csv")))
    assert by_name.metrics["accuracy"] == pytest.approx(100 - by_number.metrics["accuracy"])
    assert by_name.metrics["accuracy"] != 50


def test_numbers_written_as_text(tmp_path):
    model = shared_model("bert")
    rows = [{"sentence": s, "label": str(i % 2)} for i, s in enumerate(sentences(20))]
    as_text = evaluate(model, batches(model, json_lines(tmp_path, rows)))
    numbers = evaluate(model, batches(model, labelled(tmp_path, [i % 2 for i in range(20)])))
    assert as_text.metrics == numbers.metrics


def test_more_classes_have_accuracy_alone(tmp_path):
    model = special_model(num_labels=3)
    result = evaluate(model, batches(model, labelled(tmp_path, [i % 3 for i in range(30)])))
    assert list(result.metrics) == ["accuracy"]


def test_without_a_baseline_there_is_no_drop(tmp_path):
    model = shared_model("bert")
    result = evaluate(model, batches(model, tiny_text_csv(tmp_path)))
    assert (result.baseline_metrics, result.fidelity, result.drop) == ({}, {}, None)


def test_without_labels_the_drop_is_disagreement(tmp_path):
    model = shared_model("bert")
    path = tiny_text_csv(tmp_path, labels=None)
    result = evaluate(model, batches(model, path), other_model())
    assert (result.metrics, result.baseline_metrics, result.main) == ({}, {}, "")
    assert result.drop == pytest.approx(100 - result.fidelity["agreement"])
    assert result.drop > 0


def test_images_with_many_classes_have_top5(tmp_path):
    model = special_model(name="vit", num_labels=8)
    tiny_image_folder(tmp_path, 24, [f"class{i}" for i in range(8)])
    data = batches(model, tmp_path, 5)
    result = evaluate(model, data)
    truth = data.examples.rows["label"][:]
    with torch.no_grad():
        pixels = [model.processor(decode(row["image"]))[None] for row in data.examples.rows]
        logits = torch.cat([model.module(pixel_values=image).logits for image in pixels])
    assert result.metrics == pytest.approx(
        {
            "top1": 100 * oracle.accuracy_score(truth, logits.argmax(-1)),
            "top5": 100 * oracle.top_k_accuracy_score(truth, logits.numpy(), k=5, labels=range(8)),
        }
    )


@pytest.mark.parametrize("name", ["vit", "timm-vit"])
def test_five_classes_have_no_top5(tmp_path, name):
    model = shared_model(name)
    tiny_image_folder(tmp_path, 10, "abcde")
    result = evaluate(model, batches(model, tmp_path, 4), model)
    assert list(result.metrics) == [result.main] == ["top1"]
    assert result.fidelity == {"agreement": 100, "kl": 0}


# --- tagging and question answering


@pytest.mark.parametrize("batch_size", [1, 5])
def test_tagging_counts_first_pieces_only(tmp_path, batch_size):
    model, baseline = shared_model("bert", "tagger"), other_model("bert", "tagger")
    path = tagged(tmp_path)
    result = evaluate(model, batches(model, path, batch_size), baseline)
    truth, guess, agree, divergence = [], [], [], []
    for row in map(json.loads, path.read_text().splitlines()):
        encoded = model.processor.tokenizer(row["tokens"], is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            ours, dense = (m.module(**encoded).logits[0].double() for m in (model, baseline))
        words = encoded.word_ids()
        for word, tag in enumerate(row["tags"]):
            truth.append(tag)
            guess.append(int(ours[words.index(word)].argmax()))
        agree += (ours.argmax(-1) == dense.argmax(-1)).tolist()
        divergence += stats.entropy(dense.softmax(-1).T, ours.softmax(-1).T).tolist()
    assert result.metrics == pytest.approx(
        {
            "accuracy": 100 * oracle.accuracy_score(truth, guess),
            "f1": 100 * oracle.f1_score(truth, guess, average="macro"),
        }
    )
    assert result.main == "accuracy"
    expected = {"agreement": 100 * np.mean(agree), "kl": np.mean(divergence)}  # over all real tokens
    assert result.fidelity == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 6])
def test_question_answering_compares_start_and_end(tmp_path, batch_size):
    model, baseline = shared_model("bert", "reader"), other_model("bert", "reader")
    path = tiny_text_csv(tmp_path, rows=20)  # its labels mean nothing here
    result = evaluate(model, batches(model, path, batch_size), baseline)
    first, second = columns(path, "sentence1", "sentence2")
    agree, divergence = [], []
    for texts in zip(first, second, strict=True):
        encoded = model.processor.tokenizer(*texts, return_tensors="pt")
        with torch.no_grad():
            ours, dense = (m.module(**encoded) for m in (model, baseline))
        for side in ("start_logits", "end_logits"):
            a, b = ours[side][0].double(), dense[side][0].double()
            agree.append(bool(a.argmax() == b.argmax()))
            divergence.append(stats.entropy(b.softmax(-1), a.softmax(-1)))
    expected = {"agreement": 100 * np.mean(agree), "kl": np.mean(divergence)}
    assert result.fidelity == pytest.approx(expected, rel=1e-4)
    assert (result.task, result.metrics) == (QUESTION, {})
    assert result.drop == pytest.approx(100 - result.fidelity["agreement"])


@pytest.mark.parametrize("head", ["classifier", "tagger", "reader", "encoder"])
def test_a_model_agrees_with_itself(tmp_path, head):
    model = shared_model("roberta", head)
    path = tagged(tmp_path) if head == "tagger" else tiny_text_csv(tmp_path)
    result = evaluate(model, batches(model, path), model)
    exact = {"cosine": 100, "top10_overlap": 100} if head == "encoder" else {"agreement": 100, "kl": 0}
    assert result.fidelity == pytest.approx(exact, abs=1e-9)
    assert result.drop == pytest.approx(0, abs=1e-9)
    gate(result, 0)


def test_half_precision_inputs_follow_the_model(tmp_path):
    model = shared_model("timm-vit")
    half = dataclasses.replace(model, module=copy.deepcopy(model.module).bfloat16())
    tiny_image_folder(tmp_path, 6, "abcde")
    result = evaluate(half, batches(model, tmp_path), model)
    assert 0 < result.fidelity["kl"] < 0.1


def test_progress_counts_batches(tmp_path):
    seen: list[tuple[int, int, str]] = []
    model = shared_model("bert")
    evaluate(model, batches(model, tiny_text_csv(tmp_path), 25), on_progress=lambda *s: seen.append(s))
    assert seen == [(done, 3, "evaluating") for done in (1, 2, 3)]
