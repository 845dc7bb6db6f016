"""Sentences spoken by eSpeak NG, as its package `espeakng-loader` brings it: WAV files with their transcripts."""

from __future__ import annotations

import csv
import ctypes
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from scipy.io import wavfile

VOICES = ("en-us", "en-us+f2", "en+m3", "en-gb-x-rp+f4", "en-us+m1", "en+f5")
"""Accents of English, with variants of the voice."""
WORDS_PER_MINUTE = (140, 160, 175)
_SYNCHRONOUS, _UTF8, _CHARACTERS, _RATE = 2, 1, 1, 1
_WORDS = range(8, 31)
_ENDS = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_PLAIN = re.compile(r"(?!.*--)[A-Z][A-Za-z',;\- ]*[.!?]")


def sentences(text: Path, count: int) -> list[str]:
    """`count` sentences of 8 to 30 words from all over a text. Those with figures or signs are left out: how they are
    spoken and how they are written are two questions."""
    every = [one for line in text.read_text().splitlines() for one in _ENDS.split(line.strip())]
    plain = [one for one in every if _PLAIN.fullmatch(one) and len(one.split()) in _WORDS]
    return [plain[(2 * i + 1) * len(plain) // (2 * count)] for i in range(count)]


def speak(texts: Sequence[str], folder: Path) -> None:
    """A WAV file for each text, voices and speeds in turn, and `metadata.csv`. The same texts give the same files."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["file_name", "text"])
        for number, (text, rate, samples) in enumerate(_spoken(texts)):
            name = f"{number:03}.wav"
            wavfile.write(folder / name, rate, samples)
            table.writerow([name, text])


def _spoken(texts: Sequence[str]) -> Iterator[tuple[str, int, np.ndarray]]:
    """(text, samples of a second, int16 [samples])"""
    import espeakng_loader

    library = espeakng_loader.load_library()
    data = str(Path(espeakng_loader.get_data_path()).parent)
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, data.encode(), 0)
    if rate <= 0:
        raise RuntimeError(f"eSpeak NG does not start with the data in {data}")
    heard: list[np.ndarray] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def hear(samples: ctypes._Pointer, count: int, _: int) -> int:
        if count > 0:
            heard.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0  # go on

    library.espeak_SetSynthCallback(hear)
    try:
        for number, text in enumerate(texts):
            voice = VOICES[number % len(VOICES)]
            if library.espeak_SetVoiceByName(voice.encode()):
                raise RuntimeError(f"eSpeak NG has no voice {voice}")
            library.espeak_SetParameter(_RATE, WORDS_PER_MINUTE[number % len(WORDS_PER_MINUTE)], 0)
            content, heard[:] = text.encode() + b"\0", []
            library.espeak_Synth(content, len(content), 0, _CHARACTERS, 0, _UTF8, None, None)
            yield text, rate, np.concatenate(heard)
    finally:
        library.espeak_Terminate()
