"""Label maps: a class id for each pixel, stored as an image beside the one it is of."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from io import BytesIO
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from optin_cli.data.encoded_files import BrokenFile, encoded, name_of
from optin_cli.data.examples import Examples
from optin_cli.data.images import opened, upright
from optin_cli.errors import InputError, param

VOID = -1
"""The class of pixels that count nothing."""
Map = NDArray[np.int32]
"""Class ids, (height, width)."""
_GREYS = ("P", "L", "1", "I", "I;16", "I;16B", "I;16L")


class Masks(Sequence[Map]):
    """The label maps of sampled rows, each decoded and checked when it is asked for.

    `ignored` is the id of pixels that count nothing; they become `VOID`. With `reduced`, as processors of
    transformers call it, 0 counts nothing too, and every other id is one lower.
    """

    def __init__(self, examples: Examples, classes: int, reduced: bool = False) -> None:
        assert examples.columns.mask is not None
        self.examples = examples
        self.classes = classes
        self.reduced = reduced

    def __len__(self) -> int:
        return len(self.examples.rows)

    @overload
    def __getitem__(self, index: int) -> Map: ...
    @overload
    def __getitem__(self, index: slice) -> list[Map]: ...
    def __getitem__(self, index: int | slice) -> Map | list[Map]:
        """The map of a row, by its position in the sample. Raises `InputError` naming the row and its file."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        columns, row = self.examples.columns, self.examples.rows[index]
        stored = row[columns.mask]
        name = name_of(stored)
        where = f"{self.examples.where}: the mask in row {self.examples.row_ids[index]}"
        where += f" ({name})" if name else ""
        try:
            ids, size = decode_mask(stored), image_size(row[columns.image])
        except (BrokenFile, OSError) as error:
            raise InputError(f"{where} can't be used: {error}") from error
        if ids.shape != size:
            sizes = [f"{width} x {height}" for height, width in (ids.shape, size)]
            raise InputError(
                f"{where} has {sizes[0]} pixels, its image {sizes[1]}",
                "masks must be of their images' own size",
            )
        return self._checked(ids, where)

    def _checked(self, ids: Map, where: str) -> Map:
        """Ids of the model's classes, `VOID` for pixels that count nothing."""
        ignored = self.examples.data.ignore_index
        void = ids == ignored
        if self.reduced:
            void |= ids == 0
            ids = ids - 1
        found = np.where(void, VOID, ids)
        odd = np.unique(found[~void & ((found < 0) | (found >= self.classes))])
        if len(odd):
            shown = ", ".join(str(value + self.reduced) for value in odd[:5])
            raise InputError(
                f"{where} has the ids {shown}{' ..' if len(odd) > 5 else ''}, but the model has classes "
                f"{int(self.reduced)}..{self.classes - 1 + self.reduced} and {ignored} counts nothing",
                f"if {odd[0] + self.reduced} marks what counts nothing, say so: "
                f"{param('ignore_index', int(odd[0] + self.reduced))}"
                if len(odd) == 1
                else "check that the model was trained on these classes, and masks saved without loss (PNG)",
            )
        return found.astype(np.int32)


def decode_mask(stored: Any) -> Map:
    """The ids of a stored label map, (height, width): its palette indices or its grey values.

    Raises `BrokenFile`, also for colours.
    """
    with opened(stored) as image:
        if image.mode not in _GREYS:
            raise BrokenFile(f"it holds colours ({image.mode}), not class ids: save palette or grey values")
        return np.asarray(upright(image)).astype(np.int32)


def image_size(stored: Any) -> tuple[int, int]:
    """(height, width) of a stored image as it is shown, without decoding its pixels."""
    with warnings.catch_warnings(action="ignore"), Image.open(BytesIO(encoded(stored))) as image:
        turned = image.getexif().get(0x0112, 1) >= 5
        return image.size if turned else (image.height, image.width)
