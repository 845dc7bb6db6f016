"""Task metrics and fidelity, from scikit-learn and scipy. Scores are in points: 100 is perfect.

Pure functions of arrays and tensors; `where` names the data in errors.
"""

from __future__ import annotations

import logging
import math
import re
import string
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optin_cli.errors import InputError

log = logging.getLogger("optin")
Array = NDArray[Any]


def classification(
    logits: Array, labels: Sequence[int], images: bool = False, positive: int = 1
) -> dict[str, float]:
    """`accuracy`, which for images is called `top1`, with `top5` where there are over five classes; for two classes
    also `f1` of the class `positive` and `matthews`.

    `logits`: [examples, classes].
    """
    from sklearn import metrics

    classes, predicted = logits.shape[1], logits.argmax(axis=1)
    found = {"top1" if images else "accuracy": metrics.accuracy_score(labels, predicted)}
    if classes == 2:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # a single class needs no warning: the coefficient is 0 by convention
            found["f1"] = metrics.f1_score(labels, predicted, pos_label=positive, zero_division=0.0)
            found["matthews"] = metrics.matthews_corrcoef(labels, predicted)
    if images and classes > 5:
        found["top5"] = metrics.top_k_accuracy_score(labels, logits, k=5, labels=range(classes))
    return _points(found)


def multi_label(logits: Array, labels: Array) -> dict[str, float]:
    """`micro_f1` and `macro_f1` of the labels that are more likely on than off, and `mean_average_precision` over the
    labels that occur; `logits` and `labels` (0 or 1): [examples, labels]."""
    from sklearn import metrics

    found = {
        f"{average}_f1": metrics.f1_score(labels, logits > 0, average=average, zero_division=0.0)
        for average in ("micro", "macro")
    }
    occurring = labels.any(axis=0)
    found["mean_average_precision"] = metrics.average_precision_score(
        labels[:, occurring], logits[:, occurring], average="macro"
    )
    return _points(found)


def tagging(predicted: Sequence[Array], labels: Sequence[Array]) -> dict[str, float]:
    """`accuracy` and macro `f1` over the words; one array of classes for each row."""
    from sklearn import metrics

    guess, truth = np.concatenate(list(predicted)), np.concatenate(list(labels))
    f1 = metrics.f1_score(truth, guess, average="macro", zero_division=0.0)
    return _points({"accuracy": metrics.accuracy_score(truth, guess), "f1": f1})


def prediction(nats: float, right: int, count: int, where: str) -> dict[str, float]:
    """`perplexity` and next-token `accuracy` of `count` tokens: the sum of their negative log likelihoods, and how many
    were the likeliest."""
    if not count:
        raise InputError(f"{where} has no token that follows another, so there is nothing to predict")
    return {"perplexity": math.exp(min(nats / count, 700.0)), **_points({"accuracy": right / count})}


def segmentation(true: Array, seen: Array, counts: Array) -> dict[str, float]:
    """`miou`, the mean intersection over union of the classes that occur, and `pixel_accuracy`.

    `counts[i]` pixels are of class `true[i]` and taken for `seen[i]`.
    """
    from sklearn import metrics

    miou = metrics.jaccard_score(
        true, seen, labels=np.unique(true), average="macro", sample_weight=counts, zero_division=0.0
    )
    return _points({"miou": miou, "pixel_accuracy": metrics.accuracy_score(true, seen, sample_weight=counts)})


def correlation(values: Array, labels: Sequence[float], where: str) -> dict[str, float]:
    """`pearson` and `spearman` of [examples] values with the labels; 0 when all values are equal."""
    from scipy import stats

    if len(set(labels)) < 2:
        raise InputError(f"all labels of {where} are equal, so nothing can correlate with them")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant values are reported below
        found = {
            "pearson": float(stats.pearsonr(values, labels).statistic),
            "spearman": float(stats.spearmanr(values, labels).statistic),
        }
    if not all(math.isfinite(value) for value in found.values()):
        log.warning("the model gives the same value for every example of %s: correlation counts as 0", where)
        found = dict.fromkeys(found, 0.0)
    return _points(found)


def regression(values: Array, labels: Array, where: str) -> dict[str, float]:
    """`pearson` and `spearman`, means over the values whose labels vary, and `mse` over all, in units of the label.

    `values` and `labels`: [examples, values]. Raises `InputError` where no label varies.
    """
    pairs = list(zip(values.T, labels.T, strict=True))
    varied = [pair for pair in pairs if len(set(pair[1])) > 1] or pairs[:1]
    found = [correlation(mine, truth, where) for mine, truth in varied]
    means = {name: float(np.mean([one[name] for one in found])) for name in found[0]}
    return {**means, "mse": float(np.square(values.astype(np.float64) - labels).mean())}


def mean_cosine(first: Tensor, second: Tensor) -> float:
    """Mean cosine of matching rows of two [examples, hidden] tensors, in points."""
    return 100 * float(torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=-1).mean())


def neighbour_overlap(first: Tensor, second: Tensor, k: int = 10, chunk: int = 1024) -> float:
    """Mean share of each example's k nearest neighbours (cosine, itself left out) that agree, in points.

    `first` and `second`: [examples, hidden] of the same examples. With fewer than k others, all count.
    """
    examples = len(first)
    k = min(k, examples - 1)
    if k < 1:
        raise ValueError("neighbours need two examples")
    first, second = (torch.nn.functional.normalize(x, dim=-1) for x in (first, second))
    common = 0
    for start in range(0, examples, chunk):
        mine, theirs = (_neighbours(x, start, chunk, k) for x in (first, second))  # (chunk, k)
        common += int((mine[:, :, None] == theirs[:, None, :]).sum())
    return 100 * common / (examples * k)


def _neighbours(vectors: Tensor, start: int, chunk: int, k: int) -> Tensor:
    similarity = vectors[start : start + chunk] @ vectors.T  # (chunk, examples)
    rows = torch.arange(len(similarity), device=vectors.device)
    similarity[rows, rows + start] = -math.inf
    return similarity.topk(k, dim=1).indices


def _points(found: dict[str, Any]) -> dict[str, float]:
    return {name: 100 * float(value) for name, value in found.items()}


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


def error_rates(texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """`word_error_rate` and `character_error_rate`: what must be replaced, left out or added to make the references of
    the texts, in per cent of the words (characters) that the references have. Texts of too many words exceed 100.

    Nothing where no reference has a word.
    """
    if not any(map(str.split, references)):
        return {}
    pairs = list(zip(texts, references, strict=True))
    words = sum(edit_distance(text.split(), wanted.split()) for text, wanted in pairs)
    characters = sum(edit_distance(text, wanted) for text, wanted in pairs)
    return {
        "word_error_rate": 100 * words / sum(len(wanted.split()) for wanted in references),
        "character_error_rate": 100 * characters / sum(map(len, references)),
    }


def edit_distance(first: Sequence[str], second: Sequence[str]) -> int:
    """The least number of items replaced, left out or added that makes one sequence of the other (Levenshtein)."""
    numbers: dict[str, int] = {}
    ours, theirs = (
        np.array([numbers.setdefault(item, len(numbers)) for item in side], dtype=int)
        for side in (first, second)
    )
    columns = np.arange(len(theirs) + 1)
    row = columns  # of the first 0, 1, .. items of `theirs` from none of `ours`
    for count, item in enumerate(ours, 1):
        best = np.minimum(row[:-1] + (theirs != item), row[1:] + 1)  # kept or replaced; left out
        row = np.minimum.accumulate(np.append(count, best) - columns) + columns  # or items added behind it
    return int(row[-1])


_TAG = re.compile(r"O|[BIESULM](-.+)?")
_ENDING, _INSIDE = "ESUL", "IELM"

Entity = tuple[str, int, int]
"""(type, first tag, the one behind the last)"""


def are_tags(names: Iterable[str]) -> bool:
    """Return whether classes are tags of IOB1, IOB2, IOBES or BILOU: O, B-PER, I-PER, ..."""
    names = list(names)
    return len(names) > 1 and "O" in names and all(_TAG.fullmatch(name) for name in names)


def entities(tags: Sequence[str]) -> set[Entity]:
    """The entities of a sentence. One begins at B, S or U, behind the end of another, and where the type changes."""
    found: set[Entity] = set()
    current, start, before = None, 0, "O"
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, kind = tag.partition("-")
        goes_on = current == kind and prefix in _INSIDE and before not in _ENDING
        if not goes_on:
            if current is not None:
                found.add((current, start, place))
            current, start = (None if prefix == "O" else kind), place
        before = prefix
    return found


def entity_f1(predicted: Sequence[Sequence[str]], truth: Sequence[Sequence[str]]) -> dict[str, float]:
    """`entity_f1`, `entity_precision` and `entity_recall` over all sentences, in points; 0 where there are none."""
    right = ours = theirs = 0
    for guess, tags in zip(predicted, truth, strict=True):
        mine, wanted = entities(guess), entities(tags)
        right, ours, theirs = right + len(mine & wanted), ours + len(mine), theirs + len(wanted)
    return {
        "entity_f1": 200 * right / max(1, ours + theirs),
        "entity_precision": 100 * right / max(1, ours),
        "entity_recall": 100 * right / max(1, theirs),
    }
