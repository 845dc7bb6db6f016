"""Joined texts: what they hold, what they are kept apart by, and where there are none."""

from __future__ import annotations

import pytest
import torch
from helpers.batches import by_example, text_batches
from helpers.data import sentences, tiny_image_folder
from helpers.families import MAX_LENGTH
from helpers.models import shared_model

from optin_cli.data.batches import Batches
from optin_cli.data.examples import sample
from optin_cli.data.from_memory import BatchStore
from optin_cli.data.opening import open_batches
from optin_cli.data.packing import cover_positions
from optin_cli.data.readers import RUNNING_TEXT, SIDES
from optin_cli.data.sources import DataSpec

LETTERS = "bcdfghjklm"


def held_out(row: int) -> bool:
    return row % 5 == 4


def covered(batches: Batches, share: float = 0.5, seed: int = 0) -> Batches:
    return cover_positions(batches, share, held_out, seed)


def tokens(text: str, pair: str | None = None) -> list[int]:
    """Without the special ones at the ends, uncut."""
    ids = shared_model("bert").processor.tokenizer(text, pair)["input_ids"]
    return ids[1:-1]


def numbered(count: int, seed: int = 0, words: tuple[int, int] = (3, 20)) -> list[str]:
    """Texts that each begin with two letters of their own."""
    codes = [f"{a} {b}" for a in LETTERS for b in LETTERS][:count]
    return [f"{code} {text}" for code, text in zip(codes, sentences(count, seed, words), strict=True)]


def split(ids: list[int], texts: list[str]) -> list[int]:
    """The rows whose texts, one behind the other, give the ids of a joined text; of the last one a part will do."""
    of = {tuple(tokens(text)[:2]): row for row, text in enumerate(texts)}
    found, rest = [], ids
    while len(rest) > 1:
        row = of[tuple(rest[:2])]
        text = tokens(texts[row])
        assert text[: len(rest)] == rest[: len(text)]
        found.append(row)
        rest = rest[len(text) :]
    return found


def test_joined_texts_are_the_rows_texts_up_to_what_the_model_takes():
    texts = numbered(40, words=(8, 20))
    own = text_batches({"text": texts}, 4)
    both = covered(own)
    found = by_example(both)
    assert {i: ids for i, ids in found.items() if i < 40} == by_example(own)
    joined = {i: ids for i, ids in found.items() if i >= 40}
    assert joined
    for example, ids in joined.items():
        assert len(ids) == MAX_LENGTH
        rows = split(ids[1:-1], texts)
        assert len({held_out(row) for row in rows}) == 1  # what chooses is not fitted
        assert both.rows[example] == rows[0]
    assert {held_out(both.rows[example]) for example in joined} == {False, True}
    plain, long = sum(map(len, by_example(own).values())), sum(map(len, joined.values()))
    assert abs(long - 0.5 * plain) < 2 * MAX_LENGTH  # rows are joined whole, those held out apart


def test_batches_of_joined_texts_hold_no_more_tokens_than_the_others():
    own = text_batches({"text": sentences(60)}, 8)
    both = covered(own, 1.0)
    assert max(batch.slots for batch in both) <= 8 * max(map(len, by_example(own).values()))
    assert sum(len(batch) for batch in both) == both.count > own.count
    assert sorted(both.order) == list(range(both.count))


def test_texts_that_are_cut_are_joined_as_far_as_they_count():
    texts = sentences(30, words=(15, 20))
    both = covered(text_batches({"text": texts}, 4, max_length=8))
    assert {len(ids) for i, ids in by_example(both).items() if i < 30} == {8}
    assert {len(ids) for i, ids in by_example(both).items() if i >= 30} == {MAX_LENGTH}


def test_columns_are_joined_each_with_its_own():
    firsts, seconds = numbered(40, 0, (2, 4)), sentences(40, 1, (2, 4))
    both = covered(text_batches({"sentence1": firsts, "sentence2": seconds}, 4))
    processor = shared_model("bert").processor
    separator = processor.tokenizer.sep_token_id
    joined = {i: ids for i, ids in by_example(both).items() if i >= 40}
    for ids in joined.values():
        first = ids[1 : ids.index(separator)]
        rows = split(first, firsts)
        expected = [" ".join(texts[row] for row in rows) for texts in (firsts, seconds)]
        assert processor.tokenize(expected[:1], expected[1:])[0]["input_ids"] == ids
        assert len(rows) > 1
    sides = covered(
        text_batches({"sentence1": firsts, "sentence2": seconds}, 4, reader=SIDES)
    )  # a row is two texts, also when it is joined
    added = sides.rows[80:]
    assert added[::2] == added[1::2]


def test_words_are_joined_as_words():
    words = [text.split() for text in numbered(30)]
    both = covered(text_batches({"words": words}, 4, name="bert"))
    joined = [ids for i, ids in by_example(both).items() if i >= 30]
    assert joined
    texts = [" ".join(row) for row in words]
    assert all(len(split(ids[1:-1], texts)) > 1 for ids in joined)


def test_a_seed_draws_what_is_joined():
    own = text_batches({"text": sentences(40)}, 4)
    one, again, other = (by_example(covered(own, seed=seed)) for seed in (0, 0, 1))
    assert one == again
    assert one != other


def test_few_texts_are_joined_to_what_there_is():
    both = covered(text_batches({"text": ["a cat", "the dog"]}, 4), 1.0)
    assert by_example(both)[2] in (
        [*tokens("[CLS] a cat the dog [SEP]")],
        [*tokens("[CLS] the dog a cat [SEP]")],
    )


@pytest.mark.parametrize("case", ["none wanted", "long", "running text", "images", "given"])
def test_nothing_is_joined_where_nothing_is_to_cover(case, tmp_path):
    if case == "images":
        model = shared_model("vit")
        rows = sample(DataSpec(str(tiny_image_folder(tmp_path))), "image", None, 0)
        own = Batches(rows, model.processor, 4)
    elif case == "given":
        batch = {"input_ids": torch.tensor([tokens("a cat"), tokens("the dog")])}
        spec = DataSpec("memory:batches", "given", held=BatchStore([batch]))
        own = open_batches(spec, shared_model("bert"), None, 4, 0)
    else:
        texts = [" ".join(sentences(9)), "a cat"] if case == "long" else sentences(20)
        reader = {"reader": RUNNING_TEXT} if case == "running text" else {}
        own = text_batches({"text": texts}, 4, max_length=9 if case == "running text" else None, **reader)
    assert covered(own, 0.0 if case == "none wanted" else 0.5) is own
