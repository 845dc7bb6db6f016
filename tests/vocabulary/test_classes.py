"""The tokenizer classes of transformers, which rebuild what their files say: each opens again with the kept tokens."""

from __future__ import annotations

import json
from functools import cache

import pytest
from helpers.models import copy_of, opened
from helpers.tokenizers import trained_tokenizer
from helpers.vocabularies import END, prose, whole_model

import optin_cli as optin
from optin_cli.vocabulary.checks import check_ids, check_texts
from optin_cli.vocabulary.reduce import in_front
from optin_cli.vocabulary.tokenizer import rebuilt
from optin_cli.vocabulary.tokens import vocabulary_of

BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
BART = ["<s>", "<pad>", "</s>", "<unk>"]
CLASSES: dict[str, tuple[str, list[str], list[str]]] = {
    "BertTokenizer": ("WordPiece", BERT, []),
    "DistilBertTokenizer": ("WordPiece", BERT, []),
    "ElectraTokenizer": ("WordPiece", BERT, []),
    "MPNetTokenizer": ("WordPiece", ["<s>", "<pad>", "</s>", "<unk>", "[UNK]", "<mask>"], []),
    "GPT2Tokenizer": ("byte-level BPE", [], ["<|endoftext|>"]),
    "GPTNeoXTokenizer": ("byte-level BPE", ["<|endoftext|>", "<|padding|>"], []),
    "RobertaTokenizer": ("byte-level BPE", BART, ["<mask>"]),
    "BartTokenizer": ("byte-level BPE", BART, ["<mask>"]),
    "BlenderbotTokenizer": ("byte-level BPE", BART, ["<mask>"]),
    "DebertaTokenizer": ("byte-level BPE", ["[CLS]", "[PAD]", "[SEP]", "[UNK]"], ["[MASK]"]),
    "Qwen2Tokenizer": ("byte-level BPE", [], ["<|endoftext|>"]),
    "CLIPTokenizer": ("BPE of words", [], ["<|startoftext|>", "<|endoftext|>"]),
    "LlamaTokenizer": ("BPE with byte fallback", ["<unk>", "<s>", "</s>"], []),
    "GemmaTokenizer": ("BPE with byte fallback", ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"], []),
    "NllbTokenizer": ("BPE with byte fallback", BART, []),
    "T5Tokenizer": ("Unigram", ["<pad>", "</s>", "<unk>"], []),
    "XLMRobertaTokenizer": ("Unigram", BART, ["<mask>"]),
    "CamembertTokenizer": (
        "Unigram", ["<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED"], ["<s>", "</s>", "<mask>"]
    ),
    "AlbertTokenizer": ("Unigram", ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"], []),
    "MBartTokenizer": ("Unigram", BART, []),
    "MBart50Tokenizer": ("Unigram", BART, []),
    "DebertaV2Tokenizer": ("Unigram", ["[PAD]", "[CLS]", "[SEP]", "[UNK]"], ["[MASK]"]),
    "PegasusTokenizer": (
        "Unigram", ["<pad>", "</s>", "<mask_1>", "<mask_2>", *(f"<unk_{i}>" for i in range(2, 103)), "<unk>"], []
    ),
}  # fmt: skip
"""Class -> how its tokens were learnt, and the special ones before and behind them."""


@cache
def learnt(kind):
    """(tokens, with scores if they have any; merges)"""
    model = json.loads(trained_tokenizer(kind, prose(60)).backend_tokenizer.to_str())["model"]
    tokens = [one for one in model["vocab"] if (one if isinstance(one, str) else one[0]) not in BERT]
    return tokens, [tuple(pair) for pair in model.get("merges", [])]


@pytest.mark.parametrize("cls", CLASSES)
def test_every_class_opens_again_with_the_kept_tokens(cls, tmp_path):
    import transformers

    kind, first, last = CLASSES[cls]
    tokens, merges = learnt(kind)
    if kind == "Unigram":
        given = {
            "vocab": [*((one, 0.0) for one in first), *map(tuple, tokens), *((one, 0.0) for one in last)]
        }
    else:
        given = {"vocab": {token: id for id, token in enumerate([*first, *tokens, *last])}}
        given |= {"merges": merges} if merges else {}
    getattr(transformers, cls)(**given).save_pretrained(tmp_path / "whole")
    whole = transformers.AutoTokenizer.from_pretrained(tmp_path / "whole")
    vocabulary = vocabulary_of(whole, cls)
    special = set(whole.all_special_ids)
    used = {one for ids in whole(prose())["input_ids"] for one in ids}
    needed = set().union(*map(vocabulary.needed, used))
    kept = sorted(vocabulary.always() | special | in_front(special) | needed)
    assert len(kept) < len(whole) - 50
    ids = {old: new for new, old in enumerate(kept)}
    rebuilt(whole, vocabulary.without(kept)).save_pretrained(tmp_path / "small")
    small = transformers.AutoTokenizer.from_pretrained(tmp_path / "small")
    check_ids(whole, small, ids)
    unknown = whole.unk_token_id if kind == "WordPiece" else None
    assert check_texts(whole, small, ids, [prose(30)], unknown) >= len(prose())
    assert type(small) is type(whole)


def test_ids_in_the_files_of_earlier_versions_are_left_behind(tmp_path):
    """`added_tokens_decoder` and added_tokens.json of transformers 4."""
    folder = copy_of(whole_model("bert"), tmp_path / "m")
    tokenizer = opened(folder).processor.tokenizer
    config = json.loads((folder / "tokenizer_config.json").read_text())
    added = {
        str(id): {"content": str(token), "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                  "special": True}
        for id, token in tokenizer.added_tokens_decoder.items()
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "added_tokens_decoder": added}))
    (folder / "added_tokens.json").write_text(json.dumps({END: tokenizer.convert_tokens_to_ids(END)}))
    small = optin.vocab(opened(folder), prose(), output=tmp_path / "small")
    assert not (tmp_path / "small" / "added_tokens.json").exists()
    assert "added_tokens_decoder" not in (tmp_path / "small" / "tokenizer_config.json").read_text()
    end = opened(tmp_path / "small").processor.tokenizer.convert_tokens_to_ids(END)
    assert end == small.report.tokens - 1
