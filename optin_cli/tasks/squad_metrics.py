"""Exact match and F1 of answers, as SQuAD defines them (Rajpurkar et al. 2016)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def squad(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """`exact_match` and `f1`, each the best over a question's answers; without any, '' is right."""
    golds = [[text for text in texts if _normal(text)] or [""] for texts in answers]
    pairs = list(zip(predictions, golds, strict=True))
    exact = sum(max(_normal(guess) == _normal(gold) for gold in texts) for guess, texts in pairs)
    f1 = sum(max(_f1(guess, gold) for gold in texts) for guess, texts in pairs)
    return {"exact_match": 100 * exact / len(pairs), "f1": 100 * f1 / len(pairs)}


def _normal(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _f1(guess: str, gold: str) -> float:
    """Of the words of both; of no words it is 1 if both are empty."""
    ours, theirs = _normal(guess).split(), _normal(gold).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))
