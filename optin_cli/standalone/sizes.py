"""Sizes: {path of a module: {attribute: number, tensor: shape}}, of all that is smaller than in the dense model."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from torch import Tensor, nn

RECORD = "optin.json"

CHANGES: dict[str, Any] = {}
"""Name -> function of a module: what makes it run otherwise than its class. Further down, if this model needs any."""


def check_sizes(record: Any, file: Any) -> None:
    """Raise `ValueError` where a size is not that of the weights. Reads the headers of the files `file(name)`."""
    index = file("model.safetensors.index.json")
    names = (
        set(json.loads(Path(index).read_text())["weight_map"].values()) if index else ["model.safetensors"]
    )
    stored: dict[str, Any] = {}
    for path in filter(None, map(file, names)):
        with Path(path).open("rb") as stream:
            stored |= json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
    for module, sizes in record["resized"]["sizes"].items():
        for name, size in sizes.items():
            there = stored.get(f"{module}.{name}", {}).get("shape")
            if isinstance(size, list) and there not in (None, size):
                raise ValueError(f"{RECORD}: {module}.{name} is {size}, but the weights have {there}")


def resize(model: nn.Module, record: Any) -> None:
    """Cut the layers of a dense model. Raises `ValueError` for a size that is none of a part of it."""
    for path, sizes in record["resized"]["sizes"].items():
        if (module := find(model, path, record)) is not None:
            for name, size in sizes.items():
                _set_size(module, f"{path}.{name}", name, size)
    for path, changes in record["resized"]["runs"].items():
        if (module := find(model, path, record)) is not None:
            for change in changes:
                CHANGES[change["how"]](
                    module, **{name: value for name, value in change.items() if name != "how"}
                )


def find(model: nn.Module, path: str, record: Any) -> Any:
    """The module at a path. None in a model of another class than was saved, which may lack it or its prefix."""
    own = record["library"] != "transformers" or type(model).__name__ == record["architecture"]
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for name in (path,) if own else (path, path.removeprefix(prefix), prefix + path):
        try:
            return model.get_submodule(name)
        except AttributeError:
            continue
    if own:
        raise ValueError(f"{RECORD}: {type(model).__name__} has no {path}")
    return None


def _set_size(module: nn.Module, where: str, name: str, size: Any) -> None:
    old = getattr(module, name, None)
    if type(old) is type(size) is float:  # the scale of attention
        setattr(module, name, size)
        return
    had = list(old.shape) if isinstance(old, Tensor) else [old]
    new = size if isinstance(old, Tensor) else [size]
    pairs = zip(new, had, strict=False)
    fits = len(new) == len(had) and all(type(n) is type(m) is int and 0 <= n <= m for n, m in pairs)
    if not fits and name != "feature_info":  # timm's list of what its stages give
        raise ValueError(f"{RECORD}: {where} is {size}, no part of the dense model's {had}")
    if isinstance(old, Tensor):
        kept = old.detach()[
            tuple(slice(n) for n in new)
        ].clone()  # the first ones: weights are read afterwards
        size = nn.Parameter(kept, old.requires_grad) if isinstance(old, nn.Parameter) else kept
    setattr(module, name, size)


def noted(module: Any, how: str, **options: Any) -> dict[str, Any]:
    """Note on a module what makes it run otherwise than its class, as optin.json has it; returns the note."""
    module.optin_runs = [*getattr(module, "optin_runs", ()), {"how": how, **options}]
    return module.optin_runs[-1]


def merge_again(model: nn.Module, record: Any) -> None:
    """Let a model that merges tokens do so."""
    if record["resized"]["merging"]:
        CHANGES["merging"](model, lambda path: find(model, path, record), **record["resized"]["merging"])
