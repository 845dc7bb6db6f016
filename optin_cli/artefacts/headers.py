"""HDF5 that somebody else made: what its headers declare is checked before any content is read.

A file of 80 KB can declare 10^9 compressed numbers, be a view of other files, or link to them. `Headers` hands out
groups, arrays and attributes of the wanted types and shapes alone, and no more bytes than a file of its size can mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from optin_cli.artefacts.kinds import parse_json

_ROOM, _UNFOLDED = 2**28, 64
"""Bytes that a file's arrays may declare: so many, and so many times the file's size. Real sketches compress by two."""
_DEFLATE, _SHUFFLE = h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE
_LONGEST = 2**16
"""Entries of the longest attribute."""


class Headers:
    """An open HDF5 file. Whatever is not as wanted raises `ValueError`, with the part's name."""

    def __init__(self, file: h5py.File, path: Path) -> None:
        self.file = file
        self.left = _ROOM + _UNFOLDED * path.stat().st_size

    def names(self, group: h5py.Group) -> list[str]:
        """Of everything in a group that is in this file; a link to another one, or to another name, is refused."""
        names = list(group)
        for name in names:
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise ValueError(f"{name} is a link")
        return names

    def group(self, parent: h5py.Group, name: str) -> h5py.Group:
        if name not in self.names(parent):
            raise ValueError(f"{name} is missing")
        found = parent[name]
        if not isinstance(found, h5py.Group):
            raise ValueError(f"{name} is no group")
        return found

    def array(self, parent: h5py.Group, name: str, shape: Sequence[int | None], kind: str) -> np.ndarray:
        """The content of a data set of `shape` (None: any length) with numbers of a `kind` of numpy's."""
        dataset = self.dataset(parent, name)
        if dataset.dtype.kind != kind:
            raise ValueError(f"{name} holds {dataset.dtype}")
        found = dataset.shape
        if found is None or len(found) != len(shape) or any(
            wanted not in (None, length) for wanted, length in zip(shape, found, strict=True)
        ):  # fmt: skip
            raise ValueError(f"{name} has the shape {found}")
        self.left -= math.prod(found) * dataset.dtype.itemsize
        if self.left < 0:
            raise ValueError(f"{name} declares more than a file of this size holds")
        return dataset[...]

    def losses(
        self, parent: h5py.Group, shapes: Mapping[str, Sequence[int | None]], of: str, size: str
    ) -> list[np.ndarray]:
        """Finite float64 arrays of the `shapes`, in their order: the losses `of` something, as long as its `size`."""
        try:
            found = [
                self.array(parent, name, shape, "f").astype(np.float64) for name, shape in shapes.items()
            ]
        except ValueError as error:
            raise ValueError(f"the losses of {of} don't fit {size}: {error}") from error
        if not all(np.isfinite(one).all() for one in found):
            raise ValueError(f"the losses of {of} are not finite")
        return found

    def dataset(self, parent: h5py.Group, name: str) -> h5py.Dataset:
        """A data set whose content is in this file, as it is or deflated."""
        if name not in self.names(parent):
            raise ValueError(f"{name} is missing")
        found = parent[name]
        if not isinstance(found, h5py.Dataset):
            raise ValueError(f"{name} is no data set")
        made = found.id.get_create_plist()
        filters = {made.get_filter(i)[0] for i in range(made.get_nfilters())}
        if found.is_virtual or found.external or filters - {_DEFLATE, _SHUFFLE}:
            raise ValueError(f"{name} is not stored plainly")
        return found

    def attribute(self, holder: Any, name: str, kind: type) -> Any:
        """A number or a text; a list of whole numbers where `kind` is list."""
        header = holder.attrs.get_id(name)  # KeyError where it is missing
        if header.shape is None or math.prod(header.shape) > _LONGEST or len(header.shape) != (kind is list):
            raise ValueError(f"the attribute {name} has the shape {header.shape}")
        value = holder.attrs[name]
        if kind is list:
            if value.dtype.kind != "i":
                raise ValueError(f"the attribute {name} holds {value.dtype}")
            return value.tolist()
        value = (
            value.decode() if isinstance(value, bytes) else value if isinstance(value, str) else value.item()
        )
        if type(value) is not kind and (kind is not float or type(value) is not int):
            raise ValueError(f"the attribute {name} is {type(value).__name__}, not {kind.__name__}")
        return value

    def plain(self, holder: Any, name: str) -> Any:
        """The content of an attribute in JSON."""
        return parse_json(self.attribute(holder, name, str))
