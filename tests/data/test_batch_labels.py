"""Labels of batches: by the model's own numbers, of rows and of words."""

from __future__ import annotations

import pytest
from helpers.batches import by_example, text_batches
from helpers.data import tiny_text_csv
from helpers.models import shared_model

from optin_cli.data.batches import IGNORE, Batches
from optin_cli.data.examples import sample
from optin_cli.data.sources import DataSpec
from optin_cli.errors import InputError


@pytest.mark.parametrize(
    ("kind", "label2id"), [("class", None), ("score", None), ("name", {"negative": 0, "positive": 1})]
)
def test_labels_of_a_csv_file_are_numbers_in_row_order(kind, label2id, tmp_path):
    path = tiny_text_csv(tmp_path, rows=20, labels=kind)
    batches = Batches(sample(DataSpec(str(path)), "text", 8, 0), shared_model("bert").processor, 3)
    classes = sample(DataSpec(str(tiny_text_csv(tmp_path / "c", rows=20))), "text", 8, 0).rows["label"][:]
    labels = batches.labels(label2id)
    assert all(isinstance(label, int | float) for label in labels)
    assert labels == (batches.examples.rows["label"][:] if kind == "score" else classes)


def test_without_a_label_column_there_are_no_labels():
    assert text_batches({"text": ["cat"]}).labels() is None


def test_label_names_go_by_the_models_own_numbers():
    batches = text_batches({"text": ["a", "b", "c"], "label": ["no", "yes", "no"]})
    assert batches.labels({"yes": 0, "no": 1}) == [1, 0, 1]


def test_class_numbers_go_by_their_names_to_the_models_own_numbers():
    """A data set that calls 0 good and a model that calls 1 good mean the same."""
    rows = {"text": ["a", "b", "c"], "label": [0, 1, -1]}
    batches = text_batches(rows, classes=["good", "bad"])
    assert batches.labels({"bad": 0, "good": 1}) == [1, 0, -1]


def test_some_of_the_models_names_in_another_case_are_names_still():
    """Data of two of MNLI's classes, and a model that writes them in capitals."""
    batches = text_batches(
        {"text": ["a", "b", "c"], "label": [0, 1, 0]}, classes=["entailment", "contradiction"]
    )
    model = {"CONTRADICTION": 0, "NEUTRAL": 1, "ENTAILMENT": 2}
    assert batches.labels(model) == [2, 0, 2]
    written = text_batches({"text": ["a", "b"], "label": ["neutral", "entailment"]})
    assert written.labels(model) == [1, 2]
    assert written.labels({"Neutral": 0, "neutral": 1, "entailment": 2}) == [1, 2]


def test_a_class_that_the_model_lacks_is_an_input_error_once_it_occurs():
    def labels(*numbers):
        table = {"text": ["a"] * len(numbers), "label": list(numbers)}
        return text_batches(table, classes=["yes", "no", "maybe"]).labels({"no": 0, "yes": 1})

    assert labels(0, 1) == [1, 0]
    with pytest.raises(InputError, match=r"'maybe' of DATA.*: no, yes"):
        labels(0, 1, 2)


def test_class_numbers_stay_where_the_model_has_other_names():
    batches = text_batches({"text": ["a", "b"], "label": [0, 1]}, classes=["good", "bad"])
    assert batches.labels({"LABEL_0": 0, "LABEL_1": 1}) == [0, 1]


def test_label_names_that_the_model_does_not_know_are_an_input_error_with_both_sides():
    batches = text_batches({"text": ["a", "b"], "label": ["no", "maybe"]})
    with pytest.raises(InputError, match=r"'maybe' of DATA.*: yes, no"):
        batches.labels({"yes": 0, "no": 1})


def test_label_names_without_any_of_the_model_are_an_input_error():
    with pytest.raises(InputError, match=r"'no'.*none named"):
        text_batches({"text": ["a"], "label": ["no"]}).labels()


def test_numbers_written_as_text_are_numbers():
    batches = text_batches({"text": ["a", "b"], "score": ["4.5", "0"]})
    assert batches.labels({"LABEL_0": 0}) == [4.5, 0]


# words


TOKENS = {"tokens": [["cat", "cats", "runs"], ["old", "dog"], []], "tags": [[1, 2, 3], [4, 0], []]}


def test_words_are_tokenized_as_words():
    tokenizer = shared_model("bert", "tagger").processor.tokenizer
    expected = {
        i: tokenizer(words, is_split_into_words=True)["input_ids"] for i, words in enumerate(TOKENS["tokens"])
    }
    assert by_example(text_batches(TOKENS)) == expected


def test_the_first_token_of_each_word_has_its_tag_and_nothing_else_has():
    """cats is cat + ##s, runs is run-s in letters: only where a word starts is a tag."""
    pieces = [
        shared_model("bert", "tagger").processor.tokenizer.tokenize(word) for word in TOKENS["tokens"][0]
    ]
    assert [len(p) > 1 for p in pieces] == [False, True, False]
    first = [IGNORE]
    for tag, parts in zip(TOKENS["tags"][0], pieces, strict=True):
        first += [tag] + [IGNORE] * (len(parts) - 1)
    assert text_batches(TOKENS).labels() == [
        [*first, IGNORE],
        [IGNORE, 4, 0, IGNORE],
        [IGNORE, IGNORE],
    ]


def test_repeated_words_have_a_tag_each():
    table = {"tokens": [["cat", "cat", "cat"]], "tags": [[1, 2, 3]]}
    assert text_batches(table).labels() == [[IGNORE, 1, 2, 3, IGNORE]]


def test_tags_have_the_length_of_the_cut_tokens():
    table = {"tokens": [["cat"] * 10], "tags": [list(range(10))]}
    batches = text_batches(table, max_length=5)
    assert batches.labels() == [[IGNORE, 0, 1, 2, IGNORE]]
    assert len(by_example(batches)[0]) == 5


def test_words_and_tags_of_different_numbers_are_an_input_error_that_names_the_row():
    table = {"tokens": [["cat"], ["cat", "dog"]], "tags": [[1], [1]]}
    with pytest.raises(InputError, match="row 1 has 2 words but 1 labels"):
        text_batches(table).labels()


def test_tags_that_are_names_go_by_the_models_own_numbers():
    table = {"tokens": [["cat", "dog"]], "tags": [["O", "B-PET"]]}
    assert text_batches(table).labels({"O": 0, "B-PET": 1}) == [[IGNORE, 0, 1, IGNORE]]


def test_tags_that_the_model_does_not_know_are_an_input_error():
    table = {"tokens": [["cat", "dog"]], "tags": [["O", "B-CAR"]]}
    with pytest.raises(InputError, match="B-CAR"):
        text_batches(table).labels({"O": 0, "B-PET": 1})
