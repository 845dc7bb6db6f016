"""A uniform model as one of its library's own class: its config has the sizes, and nothing else is needed to open it.

Nothing is believed of a class: it is built from the config, and its tensors must have the shapes of the sliced model's.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from optin_cli.architectures.config_sizes import config_entries, set_entry
from optin_cli.artefacts.pruned import PrunedRecord
from optin_cli.errors import UsageError, param
from optin_cli.loading.sources import Source
from optin_cli.loading.timm_torchvision import LIBRARIES, build_vision
from optin_cli.structure.anatomy import Anatomy

_SHOWN = 3
_WAY_OUT = f"select without {param('uniform', True)}; `optin_cli.load` opens any sizes"


def as_stock(module: nn.Module, anatomy: Anatomy, source: Source, record: PrunedRecord) -> Source:
    """Write the sizes of a sliced model into its config, in place, or into the arguments of the source that comes back.

    The record then says so. Raises `UsageError` where the library would build other shapes.
    """
    if not source.library:
        raise UsageError(f"{source.spec} is of no library that could build it from a config", _WAY_OUT)
    source = sized(module, anatomy, source)
    built = build_vision(source) if source.library in LIBRARIES else _built(module)
    ours, theirs = _shapes(module), _shapes(built)
    odd = [
        f"{name} is {list(ours.get(name, ())) or 'not there'} and would be {list(theirs.get(name, ())) or 'missing'}"
        for name in sorted(set(ours) | set(theirs))
        if ours.get(name) != theirs.get(name)
    ]
    odd += [
        f"{path} runs otherwise than its class"
        for path, part in module.named_modules()
        if hasattr(part, "optin_runs")
    ]
    if odd:
        more = f"; and {len(odd) - _SHOWN} more" if len(odd) > _SHOWN else ""
        raise UsageError(
            f"a stock {type(module).__name__} can't be what the mask leaves: {'; '.join(odd[:_SHOWN])}{more}",
            _WAY_OUT,
        )
    record.resized = {"sizes": {}, "runs": {}, "merging": None}
    record.sized_config = True
    return source


def sized(module: Any, anatomy: Anatomy, source: Source) -> Source:
    """Write the sizes into the config or the source, without a check that the class takes them."""
    try:
        entries = config_entries(module, anatomy)
    except ValueError as error:
        raise UsageError(f"{source.spec} is not uniform: {error}", _WAY_OUT) from error
    if source.library in LIBRARIES:
        return replace(source, arguments={**source.arguments, **entries})
    for name, value in entries.items():
        set_entry(module.config, name, value)
    return source


def _built(module: Any) -> nn.Module:
    """The model that transformers builds from the config, without memory for its weights."""
    from huggingface_hub.errors import StrictDataclassError

    config = copy.deepcopy(module.config)
    config.__class__ = getattr(config, "dense_class", config.__class__)
    try:
        if hasattr(config, "validate"):
            config.validate()
        with torch.device("meta"):
            return type(module)._from_config(config)
    except (ValueError, TypeError, RuntimeError, ArithmeticError, StrictDataclassError) as error:
        raise UsageError(
            f"a stock {type(module).__name__} can't be built in the sizes that the mask leaves: {error}",
            _WAY_OUT,
        ) from error


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
