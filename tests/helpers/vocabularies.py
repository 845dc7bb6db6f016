"""Tiny models with tokenizers that were learnt from text, to take tokens from."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from helpers.models import new_folder, new_model, randomise
from helpers.tokenizers import trained_tokenizer
from optin_cli.data.prose import split_paragraphs

END = "<|end|>"
"""A special token behind all others."""
UNUSED = 7
"""Rows of embeddings that no token has, as models have them whose sizes are rounded."""
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("WordPiece", {}),
    "bert-masked": ("WordPiece", {}),
    "electra": ("WordPiece", {}),
    "roberta": ("byte-level BPE", {}),
    "gpt2": ("byte-level BPE", {}),
    "opt": ("byte-level BPE", {}),
    "gpt-neox": ("byte-level BPE", {"tie_word_embeddings": False}),
    "llama": ("BPE with byte fallback", {}),
    "gemma3": ("BPE with byte fallback", {}),
    "clip-text": ("BPE of words", {}),
    "t5": ("Unigram", {}),
    "t5-gated": ("Unigram", {}),
    "bart": ("byte-level BPE", {}),
    "m2m-100": ("Unigram", {}),
    "bert-to-bert": ("WordPiece", {}),
}
"""Name -> its kind of tokenizer, and what its config is changed in."""


def prose(rows: int = 12) -> list[str]:
    """Texts of general English."""
    return split_paragraphs("train")[:rows]


def whole_model(name: str) -> Path:
    """The folder of a tiny random model with all of its tokens, made once. Only for reading."""
    return _whole_model(name)


@cache
def _tokenizer(kind: str) -> Any:
    tokenizer = trained_tokenizer(kind, split_paragraphs("train")[:60])
    tokenizer.add_special_tokens({"additional_special_tokens": [END]})
    return tokenizer


@cache
def _whole_model(name: str) -> Path:
    import transformers

    kind, changes = MODELS[name]
    tokenizer = _tokenizer(kind)
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.cls_token_id}
    ids["eos_token_id"] = tokenizer.convert_tokens_to_ids(END)
    sizes = {"vocab_size": len(tokenizer) + UNUSED}
    if name in ("t5", "t5-gated", "bart", "m2m-100", "bert-to-bert"):
        ids["decoder_start_token_id"] = ids["eos_token_id"]
    if name == "roberta":  # it counts positions from that of padding
        ids |= {"pad_token_id": 1, "bos_token_id": 0}
    if name == "bert-masked":
        config = transformers.BertConfig(
            **sizes, **ids, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
        )
        model: Any = randomise(transformers.BertForMaskedLM(config)).eval()
    elif name == "bert-to-bert":
        whole = new_model(name).config.to_dict()
        for part in ("encoder", "decoder"):
            whole[part] |= {**sizes, "pad_token_id": ids["pad_token_id"]}
        config = transformers.EncoderDecoderConfig(**{**whole, **ids, **sizes})
        model = randomise(transformers.EncoderDecoderModel(config)).eval()
    else:
        model = new_model(name, **{**sizes, **ids, **changes})
    folder = new_folder() / name
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if kind == "WordPiece":  # as older libraries wrote them, too
        tokenizer.backend_tokenizer.model.save(str(folder))
    return folder
