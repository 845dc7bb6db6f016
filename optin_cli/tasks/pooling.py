"""One vector of a sequence: the poolings of sentence-transformers, and the one that a model's files name.

A pooling is a name, or several joined by `+`: their vectors one after the other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optin_cli.artefacts.kinds import load_json
from optin_cli.errors import InputError

log = logging.getLogger("optin")

MEAN = "mean"
_WITHOUT_EFFECT = ("Transformer", "Pooling", "Normalize", "Dropout")
"""Modules of sentence-transformers that have no effect on the direction of the pooled vector."""
_LEGACY = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": MEAN,
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Switches of sentence-transformers before version 5.4, in the order that it joins vectors in."""


def _weighted(hidden: Tensor, weights: Tensor) -> Tensor:
    """The mean over the tokens, weighted: (batch, tokens)."""
    return (hidden * weights[..., None]).sum(dim=1) / weights.sum(dim=1).clamp(min=1)[:, None]


def _last(hidden: Tensor, mask: Tensor) -> Tensor:
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return hidden[torch.arange(len(hidden), device=mask.device), (mask * places).argmax(dim=1)]


POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    MEAN: _weighted,
    # the direction is the mean's: the sum is divided by another number
    "mean_sqrt_len_tokens": lambda hidden, mask: (
        (hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1).clamp(min=1).sqrt()[:, None]
    ),
    "weightedmean": lambda hidden, mask: _weighted(
        hidden, mask * (torch.arange(1, mask.shape[1] + 1, device=mask.device) - _first(mask)[:, None])
    ),
    "cls": lambda hidden, mask: hidden[torch.arange(len(hidden), device=mask.device), _first(mask)],
    "lasttoken": _last,
    "max": lambda hidden, mask: hidden.masked_fill(mask[..., None] == 0, float("-inf")).amax(dim=1),
}
"""Name -> function of hidden states (batch, tokens, d) and of what marks real tokens, 1 or 0 (batch, tokens)."""


def _first(mask: Tensor) -> Tensor:
    """Position of the first real token, (batch,)."""
    return mask.argmax(dim=1)


def pooled(hidden: Tensor, attention_mask: Tensor | None, pooling: str) -> Tensor:
    """The vectors (batch, d), or (batch, n * d) of n poolings, of hidden states (batch, tokens, d)."""
    if attention_mask is None:
        attention_mask = hidden.new_ones(hidden.shape[:2])
    mask = attention_mask.to(hidden.dtype)
    return torch.cat([POOLINGS[name](hidden, mask) for name in pooling.split("+")], dim=-1)


def read_pooling(folder: Path | None) -> str:
    """The pooling that the files of a sentence-transformers model name: mean where there are none.

    Raises `InputError` for a pooling that is not known, by its name. Other modules behind the pooling (a Dense layer)
    are warned of: scores compare what the pooling gives.
    """
    if folder is None:
        return MEAN
    where = "1_Pooling"
    for module in sentence_modules(folder):
        kind = str(module.get("type")).rpartition(".")[2]
        if kind == "Pooling":
            where = str(module.get("path"))
        elif kind not in _WITHOUT_EFFECT:
            log.warning("%s: its %s behind the pooling is left out of scores", folder, kind)
    path = folder / where / "config.json"
    if not path.is_file():
        return MEAN
    settings = _read(path)
    settings = settings if isinstance(settings, dict) else {}
    named = settings.get("pooling_mode") or [name for key, name in _LEGACY.items() if settings.get(key)]
    names = [named] if isinstance(named, str) else list(named) or [MEAN]
    if unknown := [name for name in names if name not in POOLINGS]:
        raise InputError(f"{path}: unknown pooling {unknown[0]!r}", f"optin knows {', '.join(POOLINGS)}")
    return "+".join(names)


def pools_sentences(folder: Path) -> bool:
    """Return whether a folder holds a model of sentence-transformers that pools what a transformer gives."""
    return any(str(module.get("type")).endswith(".Pooling") for module in sentence_modules(folder))


def sentence_modules(folder: Path) -> list[dict[str, Any]]:
    """The modules of a sentence-transformers model, in order: `type`, and `path` in its folder. None of another."""
    path = folder / "modules.json"
    found = _read(path) if path.is_file() else []
    return [module for module in found if isinstance(module, dict)] if isinstance(found, list) else []


def _read(path: Path) -> Any:
    try:
        return load_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read: {error}", "take the one that came with the model") from error
