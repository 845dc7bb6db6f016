"""Small tokenizers of tiny text models."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

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


KINDS = ["WordPiece", "byte-level BPE", "BPE with byte fallback", "BPE of words", "Unigram"]
"""What `trained_tokenizer` can make."""


def trained_tokenizer(kind: str, texts: Iterable[str], size: int = 400) -> Any:
    """A tokenizer of `size` tokens beside bytes at most, learnt from texts, as transformers opens it from files.

    Of each kind that models have: BERT's, GPT-2's, Llama's and Gemma's, CLIP's (with an end of words), XLM-R's.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    trainer: Any
    named: dict[str, Any] = {"show_progress": False, "vocab_size": size, "special_tokens": _PAD_FIRST}
    unk = "[UNK]"
    if kind == "WordPiece":
        made = Tokenizer(models.WordPiece(unk_token=unk))
        made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        made.decoder, trainer = decoders.WordPiece(), trainers.WordPieceTrainer(**named)
    elif kind == "byte-level BPE":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder, named["vocab_size"] = decoders.ByteLevel(), size + 256
        trainer = trainers.BpeTrainer(**named, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    elif kind == "BPE with byte fallback":
        made = Tokenizer(models.BPE(unk_token=unk, fuse_unk=True, byte_fallback=True))
        made.normalizer = normalizers.Replace(" ", "\u2581")
        named["special_tokens"] = [*_PAD_FIRST, *(f"<0x{byte:02X}>" for byte in range(256))]
        named["vocab_size"] = size + 256
        spaces = decoders.Replace("\u2581", " ")
        made.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse()])
        trainer = trainers.BpeTrainer(**named, max_token_length=12)
    elif kind == "BPE of words":
        made = Tokenizer(models.BPE(unk_token=unk, end_of_word_suffix="</w>"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        made.decoder = decoders.BPEDecoder()
        trainer = trainers.BpeTrainer(**named, end_of_word_suffix="</w>")
    else:
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(**named, unk_token=unk)
    made.train_from_iterator(texts, trainer)
    ends = [(token, made.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, model_max_length=MAX_LENGTH, model_input_names=["input_ids", "attention_mask"],
        **{f"{key}_token": f"[{key.upper()}]" for key in ("pad", "unk", "cls", "sep", "mask")},
    )  # fmt: skip
