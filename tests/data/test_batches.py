"""Batches: every example once, padded to the longest of its batch, put back in order, with its label."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.batches import by_example, text_batches
from helpers.data import WORDS, sentences, tiny_image_folder
from helpers.families import IMAGE_FAMILIES, MAX_LENGTH, TEXT_FAMILIES
from helpers.models import shared_model
from helpers.runs import examples, outputs
from helpers.tokenizers import vocabulary
from hypothesis import given
from hypothesis import strategies as st

from optin_cli.data.batches import Batch, Batches
from optin_cli.data.examples import sample
from optin_cli.data.readers import SIDES
from optin_cli.data.sources import DataSpec
from optin_cli.errors import InputError


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
    with pytest.raises(InputError, match="row 2 can't be used: it is not an image"):
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
