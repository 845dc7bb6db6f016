"""A tokenizer with fewer tokens: it splits text whose tokens are all kept as before, of every kind."""

from __future__ import annotations

import json
from functools import cache

import pytest
from helpers.tokenizers import KINDS, trained_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from optin_cli.data.prose import split_paragraphs
from optin_cli.errors import InputError
from optin_cli.vocabulary.checks import check_ids, check_texts
from optin_cli.vocabulary.tokenizer import rebuilt
from optin_cli.vocabulary.tokens import BPE, vocabulary_of

ODD = [
    "Zürich, naïve!",
    "日本語 ☂ 🎈",
    "aaaaaaaaaaaa bbb",
    "don't won't",
    "x\n\ny\tz  w",
    "[CLS] [MASK]",
    "��",
]


@cache
def tokenizer(kind):
    return trained_tokenizer(kind, [*split_paragraphs("train")[:60], *ODD])


@cache
def words():
    return sorted({word for text in split_paragraphs("test")[:40] for word in text.split()})


def closed(vocabulary, tokens) -> list[int]:
    """Old ids that a choice of `tokens` keeps."""
    return sorted(vocabulary.always().union(*(vocabulary.needed(token) for token in tokens)))


def without(kind, tokens):
    """(tokenizer, the smaller one, old id -> new id)"""
    vocabulary = vocabulary_of(tokenizer(kind), kind)
    kept = closed(vocabulary, tokens)
    ids = {old: new for new, old in enumerate(kept)}
    return tokenizer(kind), rebuilt(tokenizer(kind), vocabulary.without(kept)), ids


texts = st.lists(st.one_of(st.sampled_from(words()), st.text(max_size=6)), max_size=8).map(" ".join)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_text_whose_tokens_are_kept_is_split_as_before(kind, data):
    """What is kept is drawn, so that tokens that are near each other in the merges or the scores go and stay."""
    counted = data.draw(st.lists(texts, max_size=4))
    old = tokenizer(kind)
    tokens = [one for text in counted for one in old(text)["input_ids"]]
    dropped = data.draw(st.sets(st.sampled_from(sorted(set(tokens))), max_size=3)) if tokens else set()
    before, after, ids = without(kind, [one for one in tokens if one not in dropped])
    check_ids(before, after, ids)
    unknown = before.unk_token_id
    for text in [*counted, *data.draw(st.lists(texts, max_size=4)), *ODD]:
        split = before(text)["input_ids"]
        if all(one in ids for one in split) and not (kind == "WordPiece" and unknown in split):
            assert after(text)["input_ids"] == [ids[one] for one in split], text


@pytest.mark.parametrize("kind", KINDS)
@given(text=texts)
def test_unseen_words_are_split_into_pieces_that_are_kept(kind, text):
    """Nothing that could be read becomes unknown, whatever is dropped."""
    before, after, ids = without(kind, [])
    unknown = before.unk_token_id
    if unknown not in before(text)["input_ids"]:
        assert ids[unknown] not in after(text)["input_ids"]
    assert after.decode(after(text)["input_ids"]) == before.decode(before(text)["input_ids"])


@pytest.mark.parametrize("kind", ["byte-level BPE", "BPE with byte fallback", "BPE of words"])
def test_a_token_needs_what_its_merges_pass_through(kind):
    """Against the library: with exactly the merges among what it needs, the token's own text becomes it."""
    vocabulary = vocabulary_of(tokenizer(kind), kind)
    assert isinstance(vocabulary, BPE)
    from tokenizers import Tokenizer

    long = [
        id for token, id in vocabulary.pieces.items() if len(token) > 4 and len(vocabulary.needed(id)) > 2
    ]
    assert len(long) > 20
    for token in long[::7]:
        kept = sorted(vocabulary.basic() | vocabulary.needed(token) | vocabulary.always())
        content = vocabulary.without(kept)
        made = Tokenizer.from_str(json.dumps({**content, "pre_tokenizer": None, "normalizer": None}))
        name = next(name for name, id in vocabulary.pieces.items() if id == token)
        text = name.removesuffix(vocabulary._suffix)
        assert made.encode(text, add_special_tokens=False).tokens == [name]
        for one in vocabulary.needed(token):  # and what it passes through needs nothing more
            assert vocabulary.needed(one) <= vocabulary.needed(token)


def test_whole_words_that_skip_the_merges_stay_whole():
    """`ignore_merges`: Llama 3 looks words up before it merges."""
    old = tokenizer("byte-level BPE")
    content = json.loads(old.backend_tokenizer.to_str())
    content["model"]["ignore_merges"] = True
    content["model"]["vocab"]["zqzq"] = max(content["model"]["vocab"].values()) + 1
    old = rebuilt(old, content)
    vocabulary = vocabulary_of(old, "it")
    (word,) = old("zqzq", add_special_tokens=False)["input_ids"]
    assert vocabulary.needed(word) == {word}
    kept = closed(vocabulary, [word])
    ids = {old: new for new, old in enumerate(kept)}
    small = rebuilt(old, vocabulary.without(kept))
    assert small("zqzq", add_special_tokens=False)["input_ids"] == [ids[word]]
    assert check_texts(old, small, ids, [["zqzq", "zqzqz"]], None) == 2


def test_a_merge_that_is_missing_is_found():
    """The check can fail: it sees a tokenizer that lost a merge."""
    vocabulary = vocabulary_of(tokenizer("byte-level BPE"), "it")
    long = max(vocabulary.pieces.values(), key=lambda one: (len(vocabulary.needed(one)), one))
    kept = closed(vocabulary, [long])
    content = vocabulary.without(kept)
    content["model"]["merges"] = content["model"]["merges"][:-1]
    ids = {old: new for new, old in enumerate(kept)}
    small = rebuilt(tokenizer("byte-level BPE"), content)
    text = tokenizer("byte-level BPE").decode([long])
    with pytest.raises(InputError, match="nothing was written"):
        check_texts(tokenizer("byte-level BPE"), small, ids, [[text]], None)


def test_a_token_with_another_id_is_found():
    before, after, ids = without("WordPiece", [])
    last = max(ids)
    with pytest.raises(InputError, match="would be another one"):
        check_ids(before, after, {**ids, last: ids[last] + 1})


def test_what_a_padded_tokenizer_json_says_is_renumbered():
    old = tokenizer("WordPiece")
    content = json.loads(old.backend_tokenizer.to_str())
    token, last = "[SEP]", max(content["model"]["vocab"].values())
    content["padding"] = {
        "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "[PAD]",
    }  # fmt: skip
    content["post_processor"] = {
        "type": "Sequence",
        "processors": [{"type": "BertProcessing", "sep": [token, last], "cls": ["[CLS]", 2]}],
    }
    vocabulary = type(vocabulary_of(old, "it"))(content)
    assert {last, 2} <= vocabulary.always()
    kept = sorted(vocabulary.always())
    made = vocabulary.without(kept)
    assert made["padding"]["pad_id"] == 0
    assert made["post_processor"]["processors"][0]["sep"] == [token, len(kept) - 1]


def test_others_are_refused_with_the_reason():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    of_words = Tokenizer(models.WordLevel({"[UNK]": 0, "cat": 1}, unk_token="[UNK]"))
    with pytest.raises(InputError, match="WordLevel: it can't split a word"):
        vocabulary_of(PreTrainedTokenizerFast(tokenizer_object=of_words, unk_token="[UNK]"), "it")
    with pytest.raises(InputError, match=r"no tokenizer\.json to take tokens out of"):
        vocabulary_of(object(), "it")
    content = json.loads(tokenizer("byte-level BPE").backend_tokenizer.to_str())
    content["model"]["dropout"] = 0.1
    random = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
    with pytest.raises(InputError, match="at random"):
        vocabulary_of(random, "it")
