"""Error messages for checkpoints that do not fit the model, or that a library can't read."""

from __future__ import annotations

import pickle
import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from optin_cli.errors import ArtefactError, InputError, OptinError, first_line
from optin_cli.loading.sources import Source

_PREFIXES = ("module.", "_orig_mod.", "model.")
_NAMED = 3  # weights of each kind of misfit that an error names


def misfits(model: Mapping[str, Tensor], checkpoint: Mapping[str, Any]) -> list[str]:
    """Describe how the weights of a checkpoint differ from a model's: one phrase a kind, the first few of each."""
    ours, theirs = ({key: _shape(value) for key, value in state.items()} for state in (model, checkpoint))
    kinds = {
        "of another shape": [
            _of_shapes(key, theirs[key], shape)
            for key, shape in ours.items()
            if key in theirs and theirs[key] != shape
        ],
        "missing": [f"{key} ({shape})" for key, shape in ours.items() if key not in theirs],
        "unexpected": [f"{key} ({shape})" for key, shape in theirs.items() if key not in ours],
    }
    return [_first_few(keys, kind) for kind, keys in kinds.items() if keys]


def stored_prefix(missing: Iterable[str], unread: Iterable[str]) -> str:
    """The prefix under which a checkpoint holds what is missing from a model: `module.` of DataParallel, `model.` of
    Lightning, `_orig_mod.` of torch.compile, or several. Empty if there is none, and if two hold as much.

    Libraries rename weights as they read them, so a usual prefix of all that is not read will do.
    """
    wanted, stored = set(missing), set(unread)
    held = Counter(
        key[: dot.end()] for key in stored for dot in re.finditer(r"\.", key) if key[dot.end() :] in wanted
    )
    most = held.most_common(2)
    if most and most[0][1] > len(wanted) / 2:  # tied weights are stored once
        return "" if len(most) > 1 and most[0][1] == most[1][1] else most[0][0]
    usual = (p for p in _PREFIXES if wanted and stored and all(key.startswith(p) for key in stored))
    return next(usual, "")


def other_shapes(found: Sequence[tuple[str, Sequence[int], Sequence[int]]]) -> str:
    """`misfits`' phrase for (key, shape in the file, shape in the model)."""
    shapes = [_of_shapes(key, _sizes(theirs), _sizes(ours)) for key, theirs, ours in found]
    return _first_few(shapes, "of another shape")


def _of_shapes(key: str, theirs: str, ours: str) -> str:
    return f"{key} ({theirs} in the file, {ours} in the model)"


def _first_few(keys: Sequence[str], kind: str) -> str:
    return f"{len(keys)} {kind}: {', '.join(keys[:_NAMED])}{', ..' if len(keys) > _NAMED else ''}"


def _shape(value: Any) -> str:
    return _sizes(value.shape) if isinstance(value, Tensor) else "no tensor"


def _sizes(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "one number"


class clear_errors:
    """Turn what the libraries raise for unusable weights and arguments into one sentence and the way out."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if error is None:
            return
        spec, first = self.source.spec, first_line(error)
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
            raise InputError(
                f"{spec}: its pickled weights hold more than tensors, so they are not loaded",
                "convert them to safetensors with the tool that made them",
            ) from error
        if isinstance(error, OptinError):
            return
        if type(error).__name__ in ("LocalEntryNotFoundError", "URLError"):
            library = self.source.library if self.source.architecture else "timm"
            raise InputError(
                f"{spec}: its weights can't be fetched",
                f"check the network, or give a file: {library}:NAME?checkpoint=FILE",
            ) from error
        if isinstance(error, struct.error | EOFError):  # torch.load of a file that it did not write
            raise InputError(f"{spec}: its weights are damaged", "copy or download them again") from error
        if isinstance(error, OSError | ValueError | RuntimeError | LookupError | TypeError):
            raise InputError(f"{spec} can't be opened: {first}", self._arguments()) from error
        if type(error).__name__ == "SafetensorError":
            message = f"{spec}: its safetensors file is damaged: {first}"
            if self.source.record is not None:
                raise ArtefactError(message, "run `optin apply` again") from error
            raise InputError(message, "copy or download it again") from error
        if is_panic(error) or (isinstance(error, Exception) and not _is_ours(error)):
            # values of a wrong type in its files: each library has exceptions of its own for them
            name = type(error).__name__
            said = first if first.startswith(name) else f"{name}: {first}"
            raise InputError(
                f"{spec} can't be opened: {said}", "look for wrong values in its config and processor files"
            ) from error

    def _arguments(self) -> str | None:
        """Return what to check if a model was made by name with arguments of the user's."""
        if self.source.folder is not None or not self.source.arguments:
            return None
        library = self.source.library
        return (
            f"check the arguments behind the ?: checkpoint=FILE, num_classes=10, and arguments that "
            f"{library}'s {self.source.architecture} takes"
        )


def is_panic(error: BaseException) -> bool:
    """Return whether a library in Rust has given up: what it raises is no `Exception`."""
    return type(error).__name__ == "PanicException"


def _is_ours(error: BaseException) -> bool:
    """Return whether our own code raised an error, which is then a fault of ours."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("optin_cli")
