"""How alike two samples of data are: by the tokens of their texts, or by simple features of images and spectrograms.

A model that is calibrated on other data than it meets loses more than it has to. Neither needs a forward of a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optin_cli.artefacts.facts import ContentFacts, PruningStep
from optin_cli.data.batches import Batches

_BUCKETS = 1024
_MULTIPLIER = np.uint64(2654435761)  # spreads neighbouring ids over the buckets (Knuth, TAOCP 3, 6.4)
_TEXTS, _IMAGES = 1024, 64
"""Examples that are looked at, at most."""
_HALVINGS = 10
LEAST = 64, 24
"""Texts, and images or recordings, from which on two samples are compared: fewer differ by chance."""
UNLIKE_TEXTS, UNLIKE_IMAGES = 0.83, 0.6
"""Below the first, or above the second, samples are said to be unlike: see `likeness` and `distance`."""


def content_of(batches: Batches) -> ContentFacts | None:
    """What a record keeps of the texts (a histogram of tokens) or of images and recordings (mean features); None for
    batches of neither."""
    if not _holds_texts(batches):
        if not batches.pictured:
            return None
        features = _features(batches)
        deviation = features.std(axis=0, ddof=1) if len(features) > 1 else np.zeros(features.shape[1])
        return {
            "examples": len(features),
            "tokens": None,
            "mean": [round(float(value), 6) for value in features.mean(axis=0)],
            "deviation": [round(float(value), 6) for value in deviation],
        }
    counts = _histograms(batches)
    return {
        "examples": len(counts),
        "tokens": counts.sum(axis=0).tolist(),
        "mean": None,
        "deviation": None,
    }


def difference(seen: ContentFacts | None, batches: Batches) -> str:
    """A sentence on how the data differs from what a model was made on; '' if it does not, or too little is known."""
    if seen is None or _holds_texts(batches) == (seen["tokens"] is None):
        return ""
    if seen["tokens"] is None:
        found = content_of(batches)
        if found is None or min(seen["examples"], found["examples"]) < LEAST[1]:
            return ""
        apart = distance(seen, found)
        if apart <= UNLIKE_IMAGES:
            return ""
        return (
            f"the data looks unlike what the model was pruned on: brightness, contrast and detail differ by "
            f"{apart:.1f} standard deviations on average"
        )
    counts = _histograms(batches)
    if min(seen["examples"], len(counts)) < LEAST[0]:
        return ""
    alike = likeness(np.array(seen["tokens"]), counts)
    if alike >= UNLIKE_TEXTS:
        return ""
    return (
        f"the texts look unlike those that the model was pruned on: they share {100 * alike:.0f} % of the words that "
        "two halves of one data set share"
    )


def seen_content(step: PruningStep) -> ContentFacts | None:
    """The content of the data that a pruned model was made on in its last step; None if not known."""
    return step.get("content")


def likeness(seen: np.ndarray, texts: np.ndarray) -> float:
    """The overlap of `seen` [buckets] with half of `texts` [texts, buckets], as a share of that of their other half.

    The overlap of two histograms is the sum over buckets of the smaller of both shares. The other half is cut to as
    many tokens as `seen` has, since small samples overlap less; with fewer tokens than `seen` it makes the result
    larger, never smaller. The mean over a few halvings, so that 1 is expected of two samples of one data set.
    """
    random, ratios = np.random.default_rng(0), []
    for _ in range(_HALVINGS):
        order = random.permutation(len(texts))
        one, other = np.array_split(texts[order], 2)
        enough = int(np.searchsorted(one.sum(axis=1).cumsum(), seen.sum())) + 1
        ratios.append(
            _overlap(seen, other.sum(axis=0)) / _overlap(one[:enough].sum(axis=0), other.sum(axis=0))
        )
    return float(np.mean(ratios))


def distance(one: ContentFacts, other: ContentFacts) -> float:
    """The root mean square over features of the difference of their means, in pooled standard deviations."""
    means, deviations = (np.array([facts[key] for facts in (one, other)]) for key in ("mean", "deviation"))
    if means.shape[1:] != deviations.shape[1:] or means.dtype == object:
        return 0.0
    pooled = np.sqrt((deviations**2).mean(axis=0))
    return float(np.sqrt(np.mean(((means[0] - means[1]) / np.maximum(pooled, 1e-6)) ** 2)))


def _holds_texts(batches: Batches) -> bool:
    return not batches.examples.columns.stored and "input_ids" in batches.encoded.inputs[0]


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    shares = [counts / max(counts.sum(), 1) for counts in (one, other)]
    return max(float(np.minimum(*shares).sum()), 1e-9)


def _spread(count: int, most: int) -> np.ndarray:
    """At most so many of `count` positions, spread over all of them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int))


def _histograms(batches: Batches) -> np.ndarray:
    """[texts, buckets]: how often tokens of each bucket are in a text. Special ones count nothing."""
    rows = batches.encoded.inputs
    special = np.array(
        getattr(getattr(batches.processor, "tokenizer", None), "all_special_ids", []), np.int64
    )
    chosen = [row for index in _spread(len(rows), _TEXTS) if "input_ids" in (row := rows[index])]
    counts = np.zeros((len(chosen), _BUCKETS), np.int64)
    for index, row in enumerate(chosen):
        ids = np.array(row["input_ids"], np.int64)
        counts[index] = np.bincount(_bucket(ids[~np.isin(ids, special)]), minlength=_BUCKETS)
    return counts


def _bucket(ids: np.ndarray) -> np.ndarray:
    shift = np.uint64(32 - (_BUCKETS - 1).bit_length())
    return ((ids.astype(np.uint64) * _MULTIPLIER % np.uint64(1 << 32)) >> shift).astype(np.int64)


def _features(batches: Batches) -> np.ndarray:
    """[examples, features]: of each channel its mean, its standard deviation, and the mean step between neighbours."""
    chosen = _spread(batches.count, _IMAGES)
    return np.array([_features_of(batches.stored_example(int(index))) for index in chosen])


def _features_of(example: Tensor) -> Sequence[Any]:
    planes = torch.as_tensor(example, dtype=torch.float32)
    planes = planes.reshape(
        -1, *planes.shape[-2:]
    )  # [channels, height, width]; a spectrogram has one channel
    steps = planes.diff(dim=-1).abs().mean((-2, -1))
    return torch.cat([planes.mean((-2, -1)), planes.std((-2, -1)), steps]).tolist()
