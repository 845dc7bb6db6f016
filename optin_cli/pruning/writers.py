"""The seam for formats: a `Writer` saves a pruned model, loads back what it wrote, and says how near that has to be.

`optin apply` writes directories of transformers and timm. Another format is a class with the three methods and a
`register_writer`; whatever writes a model then writes it, too, and checks it against the masked one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from optin_cli.artefacts.pruned import PrunedRecord
from optin_cli.errors import UsageError
from optin_cli.loading.checkpoint import OpenModel, open_like, save_pruned
from optin_cli.pruning.tolerance import tolerance

DIRECTORY = "directory"


class Runnable(Protocol):
    """A model that a writer loads back: it computes the output."""

    def output(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """[batch, rows, classes], as `OpenModel.output` gives it."""
        ...


@dataclass(frozen=True)
class Comparison:
    """The distance between the outputs of two models."""

    deviation: float
    """Largest absolute difference."""
    tolerance: float
    """The largest that is allowed."""

    @property
    def same(self) -> bool:
        """False as well where an output is not a number."""
        return self.deviation <= self.tolerance


class Writer(Protocol):
    """A format. `path` is a temporary folder that takes its final name once `compare` is content."""

    def save(self, path: Path, model: OpenModel, record: PrunedRecord) -> None:
        """Write a sliced model and its record into the existing, empty folder `path`."""
        ...

    def load(self, path: Path, model: OpenModel) -> Runnable:
        """Load back what `save` wrote, to run in the dtype and on the device of `model`."""
        ...

    def compare(self, expected: Sequence[Tensor], found: Sequence[Tensor], dtype: torch.dtype) -> Comparison:
        """Compare the outputs of the masked model, run in `dtype`, with those of what was loaded back, batch by
        batch."""
        ...


class DirectoryWriter:
    """Config, safetensors, processor files and `optin.json`, in the layout of the model's own library."""

    def save(self, path: Path, model: OpenModel, record: PrunedRecord) -> None:
        save_pruned(path, model, record)

    def load(self, path: Path, model: OpenModel) -> OpenModel:
        return open_like(path, model)

    def compare(self, expected: Sequence[Tensor], found: Sequence[Tensor], dtype: torch.dtype) -> Comparison:
        return compare_outputs(expected, found, dtype)


def compare_outputs(
    expected: Sequence[Tensor], found: Sequence[Tensor], dtype: torch.dtype = torch.float32
) -> Comparison:
    """The largest difference between two models' outputs, batch by batch of the same shapes, beside what `dtype`
    explains.

    Example:
        >>> optin.compare_outputs([torch.zeros(2, 1, 3)], [torch.full((2, 1, 3), 0.5)])
        Comparison(deviation=0.5, tolerance=0.0001)
    """
    pairs = zip(expected, found, strict=True)
    differences = [(a - b.to(a.device)).abs().max() for a, b in pairs if a.numel()]
    deviation = float(torch.stack(differences).max()) if differences else 0.0
    return Comparison(deviation, tolerance(dtype, expected))


DIRECTORY_WRITER = DirectoryWriter()
_WRITERS: dict[str, Writer] = {DIRECTORY: DIRECTORY_WRITER}


def register_writer(name: str, writer: Writer) -> None:
    """Add a format under a name, or replace the one of that name.

    Example:
        >>> class Weights:
        ...     def save(self, path, model, record):
        ...         torch.save(model.module.state_dict(), path / "weights.pt")
        ...
        ...     def load(self, path, model):
        ...         state = torch.load(path / "weights.pt", weights_only=True)
        ...         model.module.load_state_dict(state)
        ...         return model
        ...
        ...     def compare(self, expected, found, dtype):
        ...         return optin.compare_outputs(expected, found, dtype)
        >>> optin.register_writer("weights", Weights())
        >>> small = optin.apply(model, mask, batches, output=folder / "weights", format="weights")
        >>> sorted(path.name for path in (folder / "weights").iterdir())
        ['optin.json', 'weights.pt']
    """
    _WRITERS[name] = writer


def writer_of(name: str) -> Writer:
    """The writer of a format. Raises `UsageError` for one that is not registered."""
    if name not in _WRITERS:
        raise UsageError(f"unknown format {name!r}", f"choose one of {', '.join(_WRITERS)}")
    return _WRITERS[name]
