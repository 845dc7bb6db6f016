"""Samples of one data set look alike, those of others do not: by tokens, and by features of images."""

from __future__ import annotations

import random
import re
from collections import Counter
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.lazy import Lazy
from helpers.models import shared_model
from PIL import Image

from optin_cli.data import docs, likeness, prose
from optin_cli.data.opening import as_data, open_batches

datasets = Lazy("datasets")


def words(text: str) -> list[str]:
    """As BERT splits before word pieces."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


@cache
def vocabulary() -> dict[str, int]:
    """Word -> id, by frequency as tokenizers number theirs: the same whatever texts were seen before."""
    texts = [*prose.paragraphs(), *docs.sentences(), "a b c d"]
    counts = Counter(word for text in texts for word in words(text))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    return {word: 1000 + rank for rank, word in enumerate(ranked)}


class Texts:
    """Rows of token ids as `Batches` has them, without a model."""

    def __init__(self, texts: list[str]) -> None:
        rows = [[vocabulary()[word] for word in words(text)] for text in texts]
        self.encoded = SimpleNamespace(inputs=[{"input_ids": row} for row in rows])
        self.examples = SimpleNamespace(columns=SimpleNamespace(stored=""))
        self.processor = None


def drawn(texts, count, seed):
    return Texts(random.Random(seed).sample(list(texts), count))


KINDS = {"prose": prose.paragraphs, "docs": docs.sentences}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("seen", "measured"), [(64, 64), (512, 64), (64, 512), (300, 300)])
@pytest.mark.parametrize("seed", range(3))
def test_samples_of_one_data_set_are_alike_whatever_their_sizes(kind, seen, measured, seed):
    texts = list(KINDS[kind]())
    random.Random(seed).shuffle(texts)
    one, other = Texts(texts[:seen]), Texts(texts[-measured:])
    assert likeness.difference(likeness.content_of(one), other) == ""


@pytest.mark.parametrize(("one", "other"), [("prose", "docs"), ("docs", "prose")])
@pytest.mark.parametrize("count", [128, 500])
def test_prose_and_docstrings_are_not(one, other, count):
    seen = likeness.content_of(drawn(KINDS[one](), count, 0))
    assert "texts look unlike" in likeness.difference(seen, drawn(KINDS[other](), count, 1))


def test_few_texts_say_nothing():
    seen = likeness.content_of(drawn(prose.paragraphs(), 63, 0))
    assert likeness.difference(seen, drawn(docs.sentences(), 500, 1)) == ""
    assert likeness.difference(None, drawn(docs.sentences(), 500, 1)) == ""


def test_the_overlap_is_that_of_the_definition():
    """Two data sets over words that fall into buckets of their own: counted by hand."""
    one, other = ["a a b c"] * 64, ["a b b d"] * 64
    ids = {word: np.array([vocabulary()[word]]) for word in "abcd"}
    assert len({int(likeness._bucket(value)[0]) for value in ids.values()}) == 4
    shares = [{w: n / 4 for w, n in Counter(texts[0].split()).items()} for texts in (one, other)]
    expected = sum(min(share, shares[1].get(word, 0)) for word, share in shares[0].items())
    seen = np.array(likeness.content_of(Texts(one))["tokens"])
    counts = likeness._histograms(Texts(other))
    assert likeness.likeness(seen, counts) == pytest.approx(expected)  # halves of `other` are the same


def test_special_tokens_count_nothing():
    model = shared_model("bert")
    batches = open_batches(as_data([*prose.paragraphs()[:80]]), model, None, 32, 0)
    special = set(model.processor.tokenizer.all_special_ids)
    plain = sum(i not in special for row in batches.encoded.inputs for i in row["input_ids"])
    assert sum(likeness.content_of(batches)["tokens"]) == plain


def images(count, seed, level=128, spread=40):
    random_pixels = np.random.default_rng(seed)
    rows = [
        Image.fromarray(
            np.clip(
                random_pixels.normal(level + 20 * random_pixels.normal(), spread, (32, 32, 3)), 0, 255
            ).astype(np.uint8)
        )
        for _ in range(count)
    ]
    return open_batches(
        as_data(datasets.Dataset.from_dict({"image": rows})), shared_model("vit"), None, 16, 0
    )


def test_images_of_one_kind_are_alike_and_darker_or_smoother_ones_are_not():
    seen = likeness.content_of(images(32, 0))
    assert likeness.difference(seen, images(32, 1)) == ""
    assert "unlike" in likeness.difference(seen, images(32, 1, level=50))
    assert "unlike" in likeness.difference(seen, images(32, 1, spread=5))
    assert likeness.difference(seen, images(8, 1, level=50)) == ""


def test_texts_and_images_are_not_compared():
    assert likeness.difference(likeness.content_of(images(32, 0)), drawn(prose.paragraphs(), 100, 0)) == ""


def test_batches_of_images_that_the_caller_made_are_compared():
    import torch

    pixels = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batches = [open_batches(as_data([{"pixel_values": some}]), shared_model("vit"), None, 32, 0) for some in
               (pixels, pixels.flip(0), pixels / 8)]  # fmt: skip
    seen = likeness.content_of(batches[0])
    assert seen["tokens"] is None and len(seen["mean"]) == 9
    assert seen["mean"][0] == pytest.approx(float(pixels[:, 0].mean()), abs=1e-5)
    assert likeness.difference(seen, batches[1]) == ""
    assert "unlike" in likeness.difference(seen, batches[2])
