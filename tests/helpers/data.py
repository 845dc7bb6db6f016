"""Small data sets of random sentences and images."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

import numpy as np

_WORDS = (
    "the a cat dog bird house tree river sits runs sings falls on under near with red small old quiet very "
    "never always good bad fine dull"
)
WORDS = _WORDS.split()
ENDINGS = ["##s", "##ly", "##er"]


def sentences(count: int, seed: int = 0, words: tuple[int, int] = (3, 20)) -> list[str]:
    """`count` texts of words that the tiny tokenizers know."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(*words))) for _ in range(count)]


def tiny_text_csv(
    folder: Path,
    rows: int = 60,
    labels: str | None = "class",
    pairs: bool = True,
    seed: int = 0,
    name: str = "train.csv",
) -> Path:
    """A CSV file with `sentence1`, `sentence2` (or just `sentence`) and `label`.

    `labels`: `class` (0 or 1), `name` (negative or positive), `score` (0 to 5), or None for no such column.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed + 1)
    texts = (
        {"sentence1": sentences(rows, seed), "sentence2": sentences(rows, seed + 100)}
        if pairs
        else {"sentence": sentences(rows, seed)}
    )
    classes = rng.integers(0, 2, rows).tolist()
    column = {
        "class": classes,
        "name": [("negative", "positive")[c] for c in classes],
        "score": rng.uniform(0, 5, rows).round(2).tolist(),
        None: None,
    }[labels]
    table = texts if column is None else {**texts, "label": column}
    path = folder / name
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(table)
        writer.writerows(zip(*table.values(), strict=True))
    return path


def tiny_image_folder(
    folder: Path, n: int = 12, classes: Iterable[str] = ("cat", "dog"), seed: int = 0
) -> Path:
    """`n` noisy PNG images, spread over one folder a class."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    names = list(classes)
    for i in range(n):
        target = folder / names[i % len(names)]
        target.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(target / f"{i:03}.png")
    return folder


def sound(seconds: float, rate: int, hertz: float, seed: int = 0) -> np.ndarray:
    """A tone in noise, float64 [samples] between -1 and 1."""
    times = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(0, 0.05, len(times))
    return (0.5 * np.sin(2 * np.pi * hertz * times) + noise).clip(-1, 1)


def save_wav(path: Path, values: np.ndarray, rate: int) -> None:
    """Values between -1 and 1, [samples] or [samples, channels], in 16 bits."""
    from scipy.io import wavfile

    path.parent.mkdir(parents=True, exist_ok=True)
    wavfile.write(path, rate, (values * 32767).round().astype(np.int16))


def tiny_audio_folder(
    folder: Path, n: int = 12, classes: Iterable[str] = ("high", "low"), transcripts: bool = False
) -> Path:
    """`n` WAV files of many lengths and rates, one folder a class; with `transcripts`, in a CSV beside them."""
    names = list(classes)
    rows = []
    for i in range(n):
        rate = (8000, 16000, 11025)[i % 3]
        name = f"{names[i % len(names)]}/{i:03}.wav"
        tone = sound(0.3 + 0.1 * (i % 5), rate, 220 * (1 + i % len(names)), i)
        save_wav(folder / name, tone, rate)
        rows.append({"audio": name, "text": sentences(1, i)[0]})
    if transcripts:
        with (folder / "train.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ["audio", "text"])
            writer.writeheader()
            writer.writerows(rows)
    return folder


def tiny_masks(folder: Path, n: int = 12, classes: int = 5, void: int = 255, seed: int = 0) -> Path:
    """`n` images with label maps of coloured rectangles, in `images/` and `masks/`; a border counts nothing."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 256, (classes, 3))
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for i in range(n):
        ids = np.full((40, 52), rng.integers(classes), dtype=np.uint8)
        for _ in range(4):
            top, left = rng.integers(0, 30, 2)
            ids[top : top + 12, left : left + 15] = rng.integers(classes)
        pixels = (colours[ids] + rng.integers(-20, 20, (*ids.shape, 3))).clip(0, 255).astype(np.uint8)
        ids[:2] = void
        Image.fromarray(pixels).save(folder / "images" / f"{i:03}.jpg")
        Image.fromarray(ids).save(folder / "masks" / f"{i:03}.png")
    return folder
