"""Small tokenizers of tiny text models."""

from __future__ import annotations

from pathlib import Path

from helpers.data import ENDINGS, WORDS
from helpers.families import MAX_LENGTH

_PAD_FIRST = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# position ids of RoBERTa and MPNet count on pad = 1
_PAD_SECOND = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]


def specials(name: str) -> list[str]:
    """The tokens that a vocabulary begins with."""
    return _PAD_SECOND if name in ("roberta", "xlm-roberta", "mpnet") else _PAD_FIRST


def vocabulary(name: str) -> dict[str, int]:
    """Token -> id of a model's tokenizer."""
    letters = [prefix + letter for prefix in ("", "##") for letter in "bcdefghijklmnopqrstuvwxyz"]
    tokens = dict.fromkeys([*specials(name), *WORDS, *ENDINGS, *letters])
    return {token: i for i, token in enumerate(tokens)}


def save_tokenizer(name: str, folder: Path, max_length: int = MAX_LENGTH) -> None:
    """A small WordPiece tokenizer that AutoTokenizer finds in `folder`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = vocabulary(name)
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    types = ["token_type_ids"] if name in ("bert", "electra") else []
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        model_input_names=["input_ids", *types, "attention_mask"],
        **{f"{key}_token": f"[{key.upper()}]" for key in ("pad", "unk", "cls", "sep", "mask")},
    ).save_pretrained(folder)
