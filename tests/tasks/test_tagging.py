"""Entities against CoNLL's rules written out, and tags that data and model number differently."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from helpers.data import sentences
from helpers.lazy import Lazy
from helpers.models import new_folder, opened, shared_model, tiny_model
from helpers.runs import examples
from hypothesis import given
from hypothesis import strategies as st

from optin_cli.data.batches import Batches
from optin_cli.data.examples import sample
from optin_cli.data.sources import DataSpec
from optin_cli.measure.evaluate import evaluate
from optin_cli.tasks.metrics import are_tags, entities, entity_f1

datasets = Lazy("datasets")

TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O B-PER I-PER O", {("PER", 1, 3)}),
        ("B-PER B-PER", {("PER", 0, 1), ("PER", 1, 2)}),
        ("I-PER I-PER O I-PER", {("PER", 0, 2), ("PER", 3, 4)}),  # IOB1
        ("B-PER I-LOC", {("PER", 0, 1), ("LOC", 1, 2)}),
        ("I-PER B-PER", {("PER", 0, 1), ("PER", 1, 2)}),
        ("B-PER I-PER E-PER S-LOC", {("PER", 0, 3), ("LOC", 3, 4)}),  # IOBES
        ("B-PER L-PER U-PER", {("PER", 0, 2), ("PER", 2, 3)}),  # BILOU
        ("E-PER E-PER", {("PER", 0, 1), ("PER", 1, 2)}),
        ("S-PER I-PER", {("PER", 0, 1), ("PER", 1, 2)}),
        ("B I O I", {("", 0, 2), ("", 3, 4)}),
        ("B-A-B I-A-B", {("A-B", 0, 2)}),
        ("", set()),
    ],
)
def test_entities(tags, expected):
    assert entities(tags.split()) == expected


@given(st.lists(st.sampled_from(TAGS), max_size=12))
@examples(200)
def test_entities_of_iob_are_runs_of_one_type(tags):
    """As a regular expression over one letter a tag finds them: B starts anew, I of another type too."""
    text = "".join("OPpLl"[TAGS.index(tag)] for tag in tags)
    runs = {(m.start(), m.end()) for m in re.finditer("[Pp]p*|[Ll]l*", text)}
    assert {(start, stop) for _, start, stop in entities(tags)} == runs


def test_f1_counts_whole_entities_of_the_right_type():
    truth = [["B-PER", "I-PER", "O", "B-LOC"], ["B-LOC", "O"]]
    guess = [["B-PER", "O", "O", "B-LOC"], ["B-PER", "B-LOC"]]
    found = entity_f1(guess, truth)  # 1 right, of 4 found and 3 wanted
    assert found == pytest.approx(
        {"entity_f1": 100 * 2 / 7, "entity_precision": 25, "entity_recall": 100 / 3}
    )
    assert set(entity_f1([["O"]], [["O"]]).values()) == {0}


def test_what_are_tags():
    assert are_tags(TAGS) and are_tags(["I", "O", "B"])
    assert not are_tags(["NOUN", "VERB", "O"]) and not are_tags(["LABEL_0", "LABEL_1"]) and not are_tags([])


def tagged(folder, order=TAGS, stored: str = "class"):
    """Words with tags; `order` is how the data numbers them."""
    rng = np.random.default_rng(4)
    words = [text.split() for text in sentences(15, 3)]
    tags = [[TAGS[i] for i in rng.integers(0, 5, len(row))] for row in words]
    if stored == "text":
        path = folder / "train.jsonl"
        lines = [{"tokens": w, "ner_tags": t} for w, t in zip(words, tags, strict=True)]
        path.write_text("\n".join(map(json.dumps, lines)))
        return path, words, tags
    features = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("string")),
            "ner_tags": datasets.List(datasets.ClassLabel(names=order)),
        }
    )
    datasets.Dataset.from_dict({"tokens": words, "ner_tags": tags}, features=features).save_to_disk(
        str(folder / "data")
    )
    return folder / "data", words, tags


def measured(model, path):
    found = sample(DataSpec(str(path)), "text", None, 0)
    return evaluate(model, Batches(found, model.processor, 4), model)


def names(order) -> dict:
    return {
        "label2id": {n: i for i, n in enumerate(order)},
        "id2label": dict(enumerate(order)),
        "num_labels": 5,
    }


@pytest.mark.parametrize("stored", ["class", "text"])
def test_tags_are_the_models_own_by_name(stored, tmp_path):
    """Data and model number the tags differently."""
    order = TAGS[::-1]
    model = opened(tiny_model("bert", new_folder() / "m", "tagger", **names(order)))
    path, words, tags = tagged(tmp_path, stored=stored)
    result = measured(model, path)
    guesses = []
    for row in words:
        encoded = model.processor.tokenizer(row, is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            classes = model.module(**encoded).logits[0].argmax(-1)
        places = encoded.word_ids()
        guesses.append([order[classes[places.index(word)]] for word in range(len(row))])
    right = [a == b for one, two in zip(guesses, tags, strict=True) for a, b in zip(one, two, strict=True)]
    assert result.metrics["accuracy"] == pytest.approx(100 * np.mean(right))
    expected = entity_f1(guesses, tags)
    assert 0 < expected["entity_f1"] < 100
    assert {name: result.metrics[name] for name in expected} == pytest.approx(expected)
    assert (result.main, result.drop) == ("entity_f1", 0)


def test_the_datas_tags_name_the_classes_of_a_model_that_names_none(tmp_path):
    model = opened(tiny_model("bert", new_folder() / "m", "tagger", num_labels=5))
    path, _, _ = tagged(tmp_path)
    named = opened(tiny_model("bert", new_folder() / "n", "tagger", **names(TAGS)))
    assert measured(model, path).metrics == measured(named, path).metrics


def test_classes_that_are_no_tags_have_no_entities(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"tokens": ["cat", "dog"], "tags": [0, 1]}))
    result = measured(shared_model("bert", "tagger"), path)
    assert (list(result.metrics), result.main) == (["accuracy", "f1"], "accuracy")
