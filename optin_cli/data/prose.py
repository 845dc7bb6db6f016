"""`builtin:prose`: paragraphs of general English, written for optin and shipped with it.

News, stories, letters, recipes, reviews, captions, manuals, science and questions: what a model that is to serve any
text should see. Every machine with the same optin has the same text; it needs no hub and no download.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources

SPLITS = ("train", "validation")
_VALIDATION_SHARE = 0.25


@lru_cache(maxsize=1)
def paragraphs() -> tuple[str, ...]:
    """All paragraphs, in the order of the file."""
    text = resources.files("optin_cli.data").joinpath("prose.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())


def split_paragraphs(split: str) -> list[str]:
    """The paragraphs of one split: see `split_part`."""
    return split_part(paragraphs(), split)


def split_part(texts: Sequence[str], split: str) -> list[str]:
    """The texts that are of one split, a quarter in `validation`. Each goes by its hash: a new one moves no other."""
    held_out = split == "validation"
    limit = int(_VALIDATION_SHARE * 256)
    return [text for text in texts if (hashlib.sha256(text.encode()).digest()[0] < limit) == held_out]
