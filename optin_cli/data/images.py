"""Decode stored images to upright RGB, and describe those that can't be used."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from optin_cli.data.encoded_files import BrokenFile, encoded
from optin_cli.errors import first_line

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(stored: Any) -> Image.Image:
    """The RGB image, upright. Raises `BrokenFile`."""
    with opened(stored) as image:
        return to_rgb(upright(image))


@contextmanager
def opened(stored: Any) -> Iterator[Image.Image]:
    """An image as it is stored, its pixels loaded. Raises `BrokenFile`, also for what can't be done with it."""
    content = encoded(stored)
    if not content:
        raise BrokenFile("it is empty")
    try:
        # Pillow's warnings are of damage that it sees past, and don't say in which file
        with warnings.catch_warnings(action="ignore"), Image.open(BytesIO(content)) as image:
            image.load()
            yield image
    except UnidentifiedImageError as error:
        raise BrokenFile("it is not an image, or of an unknown kind") from error
    except (BrokenFile, MemoryError):
        raise
    except Exception as error:  # on damaged bytes, Pillow's plugins raise whatever comes up
        raise BrokenFile(first_line(error)) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode in RGB: transparency is dropped, deep grey is scaled to 8 bits."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow itself would clip; some of its versions open 16-bit grey as 32-bit integers
        deep = np.asarray(image).clip(0, 65535).astype(np.uint32)  # (height, width)
        image = Image.fromarray(((deep * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode == "F":
        values = np.nan_to_num(np.asarray(image))
        scale = 255 if values.max() <= 1 else 1  # floats are shares of white, or 8-bit values
        image = Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says."""
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # of damaged EXIF, anything: the pixels are whole, and viewers show them as they are
        return image
    return image if turn is None else image.transpose(turn)
