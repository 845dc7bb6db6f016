"""Evaluation against scikit-learn, scipy and brute force on outputs computed one example at a time."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.data import sentences, tiny_image_folder, tiny_text_csv
from helpers.families import IMAGE_SIZE
from helpers.models import new_folder, shared_model, tiny_model
from scipy import stats
from sklearn import metrics as oracle
from timm.data import create_transform

from optin_cli.data.batches import Batches
from optin_cli.data.examples import sample
from optin_cli.data.images import decode
from optin_cli.data.readers import ROWS, SIDES, Reader
from optin_cli.data.sources import DataSpec
from optin_cli.errors import GateError, InputError, UsageError
from optin_cli.measure.evaluate import Evaluation, evaluate, gate
from optin_cli.models.checkpoint import OpenModel, open_model
from optin_cli.models.processors import ImageProcessor
from optin_cli.tasks import metrics
from optin_cli.tasks.answering import QUESTION

CLOSE = 1e-3  # points


@cache
def other_model(name: str = "bert", head: str = "classifier") -> OpenModel:
    """Differs from `shared_model` a little: noise on every weight."""
    model = shared_model(name, head)
    module = copy.deepcopy(model.module)
    generator = torch.Generator().manual_seed(7)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return dataclasses.replace(model, module=module)


@cache
def special_model(head: str = "classifier", name: str = "bert", **config: Any) -> OpenModel:
    return open_model(str(tiny_model(name, new_folder() / "m", head, **config)), device="cpu")


def batches(model: OpenModel, path: Path, batch_size: int = 8, reader: Reader = ROWS, **spec: Any) -> Batches:
    examples = sample(DataSpec(str(path), **spec), model.family.modality, None, 0, reader=reader)
    processor = model.processor
    if model.source.library == "timm":
        processor = ImageProcessor(create_transform(input_size=IMAGE_SIZE), "x")
    return Batches(examples, processor, batch_size, reader=reader)


def labelled(folder: Path, labels: list[Any], text: list[str] | None = None) -> Path:
    """A CSV file with `sentence` and the given labels."""
    text = text or sentences(len(labels))
    path = folder / "train.csv"
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([("sentence", "label"), *zip(text, labels, strict=True)])
    return path


def json_lines(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tagged(folder: Path, rows: int = 12, classes: int = 2, **overrides: Any) -> Path:
    """Words (some of several pieces) with a tag for each."""
    rng = np.random.default_rng(3)
    texts = [[w + ("ly" if rng.random() < 0.4 else "") for w in s.split()] for s in sentences(rows, 5)]
    data = [{"tokens": words, "tags": rng.integers(0, classes, len(words)).tolist()} for words in texts]
    return json_lines(folder, [{**row, **overrides} for row in data])


@torch.no_grad()
def one_by_one(model: OpenModel, texts: list[str], pairs: list[str] | None = None) -> torch.Tensor:
    """Raw logits of each text, without batching, padding or `Task`."""
    rows = []
    for i, text in enumerate(texts):
        encoded = model.processor.tokenizer(text, pairs[i] if pairs else None, return_tensors="pt")
        rows.append(model.module(**encoded).logits[0])
    return torch.stack(rows)


@torch.no_grad()
def embed_one_by_one(model: OpenModel, texts: list[str]) -> torch.Tensor:
    encoded = [model.processor.tokenizer(text, return_tensors="pt") for text in texts]
    return torch.stack([model.module(**e).last_hidden_state[0].mean(dim=0) for e in encoded])


def columns(path: Path, *names: str) -> list[list[str]]:
    with path.open() as stream:
        rows = list(csv.DictReader(stream))
    return [[row[name] for row in rows] for name in names]


# --- classification


@pytest.mark.parametrize("batch_size", [1, 7, 100])
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


# --- regression and embeddings


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
    with pytest.raises(UsageError, match="max-drop"):
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


# --- refusals


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([-1] * 8, r"8 of 8 labels .* hidden \(-1\)"),
        ([0, 1, -1, 1], r"1 of 4 labels .* hidden"),
        ([0, 1, 2, 1], r"label 2, but the model has classes 0..1"),
        ([0, 1, -7, 1], "label -7, but the model has classes"),
        ([0, 1, -100, 1], "label -100, but the model has classes"),
        ([0.5, 1.0], r"label 0\.5, but the model has classes"),
    ],
)
def test_class_labels_that_do_not_fit(tmp_path, labels, message):
    model = shared_model("bert")
    with pytest.raises(InputError, match=message):
        evaluate(model, batches(model, labelled(tmp_path, labels)))


@pytest.mark.parametrize("label", [None, [1, 0], {"a": 1}])
def test_labels_of_another_kind(tmp_path, label):
    model = shared_model("bert")
    rows = [{"sentence": s, "label": label} for s in sentences(4)]
    with pytest.raises(InputError, match="where a number is needed"):
        evaluate(model, batches(model, json_lines(tmp_path, rows)))


def test_labels_of_unknown_names(tmp_path):
    model = shared_model("bert")
    with pytest.raises(InputError, match="'maybe'"):
        evaluate(model, batches(model, labelled(tmp_path, ["maybe", "no"])))


def test_a_tagger_needs_words(tmp_path):
    model = shared_model("bert", "tagger")
    with pytest.raises(InputError, match="one label for each word"):
        evaluate(model, batches(model, labelled(tmp_path, [0, 1])))


def test_tags_out_of_range_and_hidden(tmp_path):
    model = shared_model("bert", "tagger")
    with pytest.raises(InputError, match=r"label 2, but the model has classes 0\.\.1"):
        evaluate(model, batches(model, tagged(tmp_path, classes=3)))
    rows = [{"tokens": ["a", "cat"], "tags": [-1, -1]}]
    with pytest.raises(InputError, match="hidden"):
        evaluate(model, batches(model, json_lines(tmp_path, rows)))


def test_hidden_and_constant_scores(tmp_path):
    model = special_model(num_labels=1)
    with pytest.raises(InputError, match="hidden"):
        evaluate(model, batches(model, labelled(tmp_path, [-1.0] * 5)))
    with pytest.raises(InputError, match="equal"):
        evaluate(model, batches(model, labelled(tmp_path, [2.5] * 5)))


def test_one_score_of_minus_one_is_a_score(tmp_path):
    model = special_model(num_labels=1)
    assert evaluate(model, batches(model, labelled(tmp_path, [-1.0, 0.5, 1.0]))).main == "spearman"


def test_a_model_that_always_says_the_same_correlates_with_nothing(tmp_path, caplog):
    model = special_model(num_labels=1)
    module = copy.deepcopy(model.module)
    module.classifier.weight.data.zero_()
    data = batches(model, labelled(tmp_path, [0.1, 0.5, 1.0, 0.7]))
    result = evaluate(dataclasses.replace(model, module=module), data, model)
    assert (result.metrics["pearson"], result.metrics["spearman"]) == (0, 0)
    assert result.drop == result.baseline_metrics["spearman"]
    assert "same value for every example" in caplog.text


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("as_baseline", [False, True])
def test_outputs_that_are_not_finite(tmp_path, broken, as_baseline):
    model = shared_model("bert")
    module = copy.deepcopy(model.module)
    module.classifier.bias.data[0] = broken
    bad = dataclasses.replace(model, module=module)
    pair = (model, bad) if as_baseline else (bad, model)
    with pytest.raises(InputError, match="not finite for 8 of 8 examples"):
        evaluate(pair[0], batches(model, tiny_text_csv(tmp_path)), pair[1])


def test_nothing_to_measure(tmp_path):
    model = shared_model("bert")
    with pytest.raises(UsageError, match="nothing to measure"):
        evaluate(model, batches(model, tiny_text_csv(tmp_path, labels=None)))


def test_a_baseline_for_another_task_or_of_another_shape(tmp_path):
    model = shared_model("bert")
    data = batches(model, tiny_text_csv(tmp_path))
    with pytest.raises(UsageError, match=r"does sequence-classification, but the baseline .* does embedding"):
        evaluate(model, data, shared_model("bert", "encoder"))
    with pytest.raises(UsageError, match=r"shape \(1, 2\), but the baseline .* \(1, 3\)"):
        evaluate(model, data, special_model(num_labels=3))


class BrokenPadding(torch.nn.Module):
    """A tagger that gives NaN for padding, which nobody reads."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module
        self.config = module.config

    def forward(self, attention_mask: torch.Tensor, **inputs: torch.Tensor) -> Any:
        result = self.module(attention_mask=attention_mask, **inputs)
        result.logits = result.logits.masked_fill(attention_mask[..., None] == 0, float("nan"))
        return result


def test_padding_is_not_looked_at(tmp_path):
    model, baseline = shared_model("bert", "tagger"), other_model("bert", "tagger")
    broken = dataclasses.replace(model, module=BrokenPadding(model.module))
    data = batches(model, tagged(tmp_path))
    assert evaluate(broken, data, baseline) == evaluate(model, data, baseline)


# --- the gate


def with_drop(drop: float | None) -> Evaluation:
    return Evaluation("sequence-classification", 10, {"accuracy": 87.0}, "accuracy", drop=drop)


def test_the_gate_names_both_numbers():
    with pytest.raises(
        GateError, match=r"accuracy drops by 1\.250 points, more than the 0\.5 allowed"
    ) as raised:
        gate(with_drop(1.25), 0.5)
    assert raised.value.exit_code == 5


@pytest.mark.parametrize(("drop", "allowed"), [(0.5, 0.5), (88.2 - 87.2, 1.0), (-3.0, 0.0)])
def test_the_gate_opens_up_to_the_limit(drop, allowed):
    gate(with_drop(drop), allowed)


def test_a_drop_that_is_no_number_does_not_pass():
    with pytest.raises(GateError):
        gate(with_drop(float("nan")), 50)


def test_a_gate_needs_a_baseline():
    with pytest.raises(UsageError, match="--max-drop needs"):
        gate(with_drop(None), 1)
