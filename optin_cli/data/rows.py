"""The rows of a split: how many there are, which are drawn, and what they hold. A stream is read no further than
it must be."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from optin_cli.data.encoded_files import BrokenFile, encoded
from optin_cli.data.sources import DataSpec, open_split, open_stream, reading
from optin_cli.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

_WINDOW = 20  # rows of a stream that are read for each one drawn
_FIRST_ROWS = 100  # that show its columns


def draw(total: int, samples: int | None, seed: int) -> list[int]:
    """Ascending positions of `samples` rows out of `total`, or of all."""
    if samples is None or samples >= total:
        return list(range(total))
    return sorted(np.random.default_rng(seed).choice(total, samples, replace=False).tolist())


def spare(total: int, taken: Iterable[int], seed: int) -> list[int]:
    """The rows that `draw` left, in the order in which they replace what it drew."""
    left = np.setdiff1d(np.arange(total), np.fromiter(taken, dtype=np.int64))
    return np.random.default_rng([seed, 1]).permutation(left).tolist()


class SplitRows:
    """Rows that are all at hand. Raises `InputError` if there are none."""

    def __init__(self, data: DataSpec) -> None:
        self.data = data
        self.first = open_split(data)
        """Return enough rows to find the columns from."""
        self.total = len(self.first)
        """Rows of the split."""
        if self.total == 0:
            raise InputError(f"{data.spec} ({data.split}) is empty")

    def draw(self, samples: int | None, seed: int) -> list[int]:
        """Ascending positions of `samples` rows, or of all."""
        return draw(self.total, samples, seed)

    def at(self, row_ids: list[int], stored: str | None = None) -> Dataset:
        """The rows at ascending positions. Raises `InputError` if they are not there."""
        if row_ids and row_ids[-1] >= self.total:
            raise _gone(self.data, self.total, row_ids)
        return self.first.select(row_ids)


class StreamRows:
    """Rows that come one after the other; those that were asked for are held. Files are undecoded."""

    def __init__(self, data: DataSpec) -> None:
        import datasets

        self.data = data
        self.stream = open_stream(data)
        self.total = 0
        """Rows that were drawn from, or read."""
        self.held: dict[int, dict[str, Any]] = {}
        with reading(data):
            first = list(self.stream.take(_FIRST_ROWS))
            self.first = datasets.Dataset.from_list(first, features=self._features)
        if len(self.first) == 0:
            raise InputError(f"{data.spec} ({data.split}) is empty")

    def draw(self, samples: int | None, seed: int) -> list[int]:
        """Ascending positions of `samples` of the first 20 * `samples` rows, or of all rows."""
        with reading(self.data):
            if samples is None:
                self.held = dict(enumerate(self.stream))
                self.total = len(self.held)
                return list(range(self.total))
            window = _WINDOW * samples
            row_ids = draw(window, samples, seed)
            self.total = self._hold(row_ids, window)
            return row_ids if self.total == window else draw(self.total, samples, seed)

    def at(self, row_ids: list[int], stored: str | None = None) -> Dataset:
        """The rows at ascending positions, with the content of the files in column `stored`, wherever it is."""
        import datasets

        with reading(self.data):
            if missing := [i for i in row_ids if i not in self.held]:
                read = self._hold(missing, missing[-1] + 1)
                self.total = max(self.total, read)
                if read <= missing[-1]:
                    raise _gone(self.data, read, row_ids)
            if stored is not None:
                for row in row_ids:
                    self.held[row] = {**self.held[row], stored: _with_bytes(self.held[row][stored])}
            rows = [self.held[i] for i in row_ids]
            return datasets.Dataset.from_list(rows, features=self._features)

    @property
    def _features(self) -> Any:
        """The types of the columns. An `Audio` would want torchcodec to take in what it gave out itself."""
        import datasets

        stored = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
        features = self.stream.features or {}
        plain = {name: stored if isinstance(f, datasets.Audio) else f for name, f in features.items()}
        return datasets.Features(plain) if plain else None

    def _hold(self, row_ids: list[int], window: int) -> int:
        """Keep the rows at these positions; returns how many of the first `window` there are."""
        wanted, seen = set(row_ids), 0
        for row in self.stream.take(window):
            if seen in wanted:
                self.held[seen] = row
            seen += 1
        return seen


def _with_bytes(stored: Any) -> Any:
    """An undecoded file with its content, so that it is read once; a broken one stays as it is."""
    if not isinstance(stored, dict) or stored["bytes"] is not None:
        return stored
    try:
        return {**stored, "bytes": encoded(stored)}
    except BrokenFile:
        return stored


def _gone(data: DataSpec, total: int, row_ids: list[int]) -> InputError:
    return InputError(f"{data.spec} ({data.split}) has {total} rows now; row {row_ids[-1]} is gone")
