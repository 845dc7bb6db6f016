"""Batches: every example once, padded to the longest of its batch, put back in order, with its label."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset
from helpers.data import WORDS, sentences, tiny_image_folder, tiny_text_csv
from helpers.families import IMAGE_FAMILIES, MAX_LENGTH, TEXT_FAMILIES
from helpers.models import shared_model, vocabulary
from helpers.runs import examples, outputs
from hypothesis import given
from hypothesis import strategies as st

from optin_cli.data.batches import IGNORE, Batch, Batches
from optin_cli.data.columns import find_columns
from optin_cli.data.examples import Examples, sample
from optin_cli.data.readers import SIDES
from optin_cli.data.sources import DataSpec
from optin_cli.errors import InputError


def rows_of(table: dict[str, list], classes: list[str] | None = None) -> Examples:
    """All rows of a table, as `sample` gives them, but without a file. `classes` names its labels."""
    rows = Dataset.from_dict(table)
    if classes:
        rows = rows.cast_column("label", ClassLabel(names=classes))
    data = DataSpec("DATA")
    ids = list(range(len(rows)))
    return Examples(data, find_columns(rows, data, "text"), ids, rows, len(rows), "")


def text_batches(
    table: dict[str, list],
    batch_size: int = 4,
    name: str = "bert",
    classes: list[str] | None = None,
    **options,
) -> Batches:
    return Batches(rows_of(table, classes), shared_model(name).processor, batch_size, **options)


def real_tokens(batch: Batch, position: int) -> list[int]:
    """Token ids of an example without its padding."""
    return batch.inputs["input_ids"][position][batch.valid[position]].tolist()


def by_example(batches: Batches) -> dict[int, list[int]]:
    """Example id -> its token ids."""
    return {
        example: real_tokens(batch, position)
        for batch in batches
        for position, example in enumerate(batch.example_ids)
    }


def tokenized(text: str, pair: str | None = None, name: str = "bert") -> list[int]:
    tokenizer = shared_model(name).processor.tokenizer
    return tokenizer(text, pair, truncation=True)["input_ids"]


texts = st.lists(st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join), min_size=1, max_size=15)


# order, padding


@examples(40)
@given(texts=texts, batch_size=st.integers(1, 8))
def test_every_text_is_in_one_batch_with_its_own_tokens(texts, batch_size):
    batches = text_batches({"text": texts}, batch_size)
    assert by_example(batches) == {i: tokenized(text) for i, text in enumerate(texts)}
    assert sum(len(batch) for batch in batches) == batches.count == len(texts)


@examples(40)
@given(texts=texts, batch_size=st.integers(1, 8))
def test_texts_go_from_short_to_long_and_batches_are_no_longer_than_their_longest(texts, batch_size):
    lengths = []
    for batch in text_batches({"text": texts}, batch_size):
        assert batch.inputs["input_ids"].shape == batch.valid.shape
        assert batch.valid.any(dim=0).all()  # no column is padding alone
        lengths += batch.valid.sum(dim=1).tolist()
    assert lengths == sorted(lengths)


@examples(20)
@given(count=st.integers(1, 12), batch_size=st.integers(1, 8))
def test_only_the_last_batch_is_not_full(count, batch_size):
    sizes = [len(batch) for batch in text_batches({"text": sentences(count)}, batch_size)]
    assert len(sizes) == len(text_batches({"text": sentences(count)}, batch_size))
    assert all(size == batch_size for size in sizes[:-1])
    assert 1 <= sizes[-1] <= batch_size


@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_padding_is_the_padding_token_out_of_attention(name):
    model = shared_model(name)
    for batch in text_batches({"text": sentences(10)}, 5, name):
        assert torch.equal(batch.valid, batch.inputs["attention_mask"].bool())
        assert set(batch.inputs["input_ids"][~batch.valid].tolist()) <= {model.module.config.pad_token_id}
        assert (batch.inputs["input_ids"][batch.valid] != model.module.config.pad_token_id).all()


@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_a_text_has_the_same_output_in_any_batch(name):
    model = shared_model(name)
    table = {"text": sentences(9)}
    together = in_row_order(model, text_batches(table, 9, name))
    alone = in_row_order(model, text_batches(table, 1, name))
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def in_row_order(model, batches: Batches) -> torch.Tensor:
    results = {}
    for batch in batches:
        rows = outputs(model, model.module, batch.inputs)
        results.update(zip(batch.example_ids, rows, strict=True))
    return torch.stack([results[i] for i in range(batches.count)])


def test_texts_of_one_length_keep_their_order():
    assert text_batches({"text": ["cat", "dog", "bird", "house"]}, 4).order == [0, 1, 2, 3]


def test_a_second_pass_gives_the_same_batches():
    batches = text_batches({"text": sentences(10)}, 3)
    for one, other in zip(batches, batches, strict=True):
        assert one.example_ids == other.example_ids
        assert all(torch.equal(one.inputs[key], other.inputs[key]) for key in one.inputs)


@pytest.mark.parametrize("index", [-1, 3])
def test_a_batch_that_is_not_there_is_an_index_error(index):
    with pytest.raises(IndexError):
        text_batches({"text": sentences(9)}, 3)[index]


@pytest.mark.parametrize(("asked", "given"), [(5, 5), (None, MAX_LENGTH), (1000, MAX_LENGTH)])
def test_long_texts_are_cut_to_the_length_asked_for_or_what_the_model_takes(asked, given):
    [batch] = text_batches({"text": ["cat " * 200]}, max_length=asked)
    assert batch.inputs["input_ids"].shape == (1, given)
    assert batch.inputs["input_ids"][0, -1] == vocabulary("bert")["[SEP]"]


@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_the_longest_text_fits_the_model(name):
    model = shared_model(name)
    [batch] = text_batches({"text": ["cat " * 200]}, 1, name)
    assert outputs(model, model.module, batch.inputs).isfinite().all()


def test_a_missing_text_is_an_empty_one():
    batches = text_batches({"text": ["cat", None]})
    assert by_example(batches)[1] == tokenized("")


# pairs


PAIRS = {"sentence1": sentences(6), "sentence2": sentences(6, seed=1)}


def test_two_columns_are_one_example_of_two_segments():
    batches = text_batches(PAIRS)
    expected = {i: tokenized(a, b) for i, (a, b) in enumerate(zip(*PAIRS.values(), strict=True))}
    assert by_example(batches) == expected
    batch = batches[0]
    second = batch.inputs["token_type_ids"][0][batch.valid[0]]
    pair = PAIRS["sentence2"][batch.example_ids[0]]
    assert second.tolist() == [0] * (len(second) - len(pair.split()) - 1) + [1] * (len(pair.split()) + 1)


def test_two_columns_apart_are_two_examples_a_row():
    found = by_example(text_batches(PAIRS, reader=SIDES))
    assert len(found) == 12
    for row in range(6):
        assert found[2 * row] == tokenized(PAIRS["sentence1"][row])
        assert found[2 * row + 1] == tokenized(PAIRS["sentence2"][row])


def test_a_single_column_apart_is_as_ever():
    table = {"text": sentences(5)}
    assert by_example(text_batches(table, reader=SIDES)) == by_example(text_batches(table))


def test_two_columns_apart_still_have_one_label_a_row():
    batches = text_batches({**PAIRS, "score": [0.5, 1, 2, 3, 4, 5]}, reader=SIDES)
    assert batches.labels() == [0.5, 1, 2, 3, 4, 5]


# labels


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


# images


def image_batches(folder: Path, name: str = "vit", batch_size: int = 4) -> Batches:
    images = sample(DataSpec(str(folder)), "image", None, 0)
    return Batches(images, shared_model(name).processor, batch_size)


@pytest.mark.parametrize("name", IMAGE_FAMILIES)
def test_images_come_in_order_as_the_model_takes_them(name, tmp_path):
    model = shared_model(name)
    batches = image_batches(tiny_image_folder(tmp_path / "d", n=6), name)
    assert [batch.example_ids for batch in batches] == [[0, 1, 2, 3], [4, 5]]
    assert all(batch.valid is None for batch in batches)
    for batch in batches:
        assert outputs(model, model.module, batch.inputs).shape == (len(batch), 5)
    assert batches.labels() == [0, 0, 0, 1, 1, 1]


def test_each_image_is_the_processed_file(tmp_path):
    from PIL import Image

    folder = tiny_image_folder(tmp_path / "d", n=3, classes=["cat"])
    processor = shared_model("vit").processor
    [batch] = image_batches(folder)
    for position, path in enumerate(sorted((folder / "cat").iterdir())):
        assert torch.equal(batch.inputs["pixel_values"][position], processor(Image.open(path)))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_images_of_any_mode_become_three_colours(mode, tmp_path):
    from PIL import Image

    (tmp_path / "cat").mkdir()
    Image.new(mode, (40, 40)).save(tmp_path / "cat" / ("x.tif" if mode == "CMYK" else "x.png"))
    [batch] = image_batches(tmp_path)
    assert batch.inputs["pixel_values"].shape == (1, 3, 32, 32)


def test_an_image_that_breaks_after_it_was_looked_at_is_an_input_error_that_names_its_row(tmp_path):
    folder = tiny_image_folder(tmp_path / "d", n=4, classes=["cat"])
    batches = image_batches(folder)
    (folder / "cat" / "002.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match="row 2 can't be used: it is no image"):
        list(batches)


# moving


def test_moving_changes_the_dtype_of_pixels_but_not_of_token_ids():
    ids, pixels = torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 3)
    moved = Batch({"ids": ids, "pixels": pixels}, torch.ones(1, 2, dtype=torch.bool), [0]).to(
        torch.device("meta"), torch.bfloat16
    )
    assert (moved.inputs["ids"].dtype, moved.inputs["pixels"].dtype) == (torch.long, torch.bfloat16)
    assert {t.device.type for t in (*moved.inputs.values(), moved.valid)} == {"meta"}
    assert moved.valid.dtype == torch.bool
    assert moved.example_ids == [0]


def test_moving_without_a_dtype_keeps_it():
    moved = Batch({"pixels": torch.zeros(1, 3)}, None, [0]).to(torch.device("cpu"))
    assert moved.inputs["pixels"].dtype == torch.float32
    assert moved.valid is None
