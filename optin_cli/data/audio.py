"""Stored recordings -> samples of one channel, and what is wrong with those that can't be used.

WAV is read by SciPy. Other kinds need the package soundfile, an optional one.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np

from optin_cli.data.encoded_files import BrokenFile, encoded
from optin_cli.errors import InputError, first_line

SUFFIXES = {".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif", ".au"}
_WAV = (b"RIFF", b"RIFX", b"RF64")
_OTHERS = {
    b"fLaC": "FLAC",
    b"OggS": "Ogg",
    b"ID3": "MP3",
    b"\xff\xfb": "MP3",
    b"\xff\xf3": "MP3",
    b"FORM": "AIFF",
}


@dataclass(frozen=True)
class Recording:
    """Sound as numbers."""

    samples: np.ndarray
    """float32 [samples], between -1 and 1: the mean of all channels."""
    rate: int
    """Samples of a second."""


def decode(stored: Any) -> Recording:
    """The recording. Raises `BrokenFile`, and `InputError` for a kind that needs a package that is not there."""
    content = encoded(stored)
    if not content:
        raise BrokenFile("it is empty")
    rate, values = _wav(content) if content.startswith(_WAV) else _other(content)
    samples = values.mean(axis=1) if values.ndim == 2 else values  # (samples, channels)
    if not len(samples):
        raise BrokenFile("it holds no sound")
    if rate <= 0:
        raise BrokenFile(f"it has {rate} samples a second")
    if not np.isfinite(samples).all():
        raise BrokenFile("it holds values that are not finite")
    return Recording(samples.astype(np.float32), int(rate))


def resampled(recording: Recording, rate: int) -> np.ndarray:
    """The samples at another rate, float32 [samples]: low-pass filtered where it is lower."""
    if recording.rate == rate:
        return recording.samples
    from scipy.signal import resample_poly

    divisor = np.gcd(rate, recording.rate)
    return resample_poly(recording.samples, rate // divisor, recording.rate // divisor).astype(np.float32)


def _wav(content: bytes) -> tuple[int, np.ndarray]:
    """(rate, values between -1 and 1 [samples] or [samples, channels])"""
    from scipy.io import wavfile

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            rate, values = wavfile.read(BytesIO(content))
    except ValueError as error:
        if "Unknown wave file format" in str(error):  # such as mu-law: soundfile knows more of them
            return _other(content)
        raise BrokenFile(first_line(error)) from error
    except Exception as error:  # on a damaged header, whatever comes up: struct.error, MemoryError, ..
        raise BrokenFile(first_line(error)) from error
    if cut := next((w for w in caught if "EOF" in str(w.message)), None):
        raise BrokenFile(str(cut.message))
    if values.dtype == np.uint8:
        return rate, (values.astype(np.float32) - 128) / 128
    if values.dtype.kind == "i":  # 24 bits are in the upper part of 32
        return rate, values.astype(np.float64) / -float(np.iinfo(values.dtype).min)
    return rate, values


def _other(content: bytes) -> tuple[int, np.ndarray]:
    """The same of any other kind that soundfile reads."""
    kind = next((name for start, name in _OTHERS.items() if content.startswith(start)), "")
    kind = kind or ("this WAV" if content.startswith(_WAV) else "")
    try:
        import soundfile
    except ImportError as error:
        if not kind:
            raise BrokenFile("it is not a recording, or of an unknown kind") from error
        raise InputError(
            f"reading {kind} needs the package soundfile", "install it: pip install 'optin[audio]'"
        ) from error
    try:
        values, rate = soundfile.read(BytesIO(content), dtype="float32")
    except soundfile.LibsndfileError as error:
        raise BrokenFile(first_line(error)) from error
    return rate, values
