"""Open a model, by name or in memory; and what the other functions have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from optin_cli.architectures.families import Family, read_family
from optin_cli.errors import UsageError, param
from optin_cli.loading import checkpoint
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.loading.from_module import open_held

Model = OpenModel | nn.Module | str | Path
"""A model as the caller has it."""
Data = Any
"""Data as the caller has it: a DATA argument, `DataSpec`, `datasets.Dataset`, list, DataLoader or iterable."""
Progress = Callable[[float, float, str], None]
"""Called with (work done, all work, what is being done)."""


def open_model(
    model: Model,
    *,
    processor: Any = None,
    task: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    family: Family | str | Path | None = None,
    device_map: str | dict[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> OpenModel:
    """Open a model: by its name or directory, or a module that is in memory already.

    Args:
        model: a hub id, a directory (pruned or not), `timm:NAME`, `torchvision:NAME`, `demo:minilm`, or an
            `nn.Module`. A module is left as it is: what is opened has the same weights in memory and nothing else of
            it, so change none of its weights while you use both.
        processor: for a module, what makes its inputs from data: its tokenizer, image processor or feature extractor,
            or a transform from a PIL image to a tensor (3, height, width). Batches of tensors need none.
        task: what the model does, if its config does not say.
        device: `auto`, `cpu`, `cuda` or `cuda:1`. `auto` is where a module is, and else a GPU where there is one.
        dtype: what is computed in: `float32`, `float16`, `bfloat16`, or `auto` for that of the weights. Scores are
            small changes, which half precision drowns. A pruned copy is stored in the dtype of the weights.
        family: the table of an architecture that is not known: a `Family`, or a YAML file of one.
        device_map: spreads a transformers model over several devices, as in accelerate.
        trust_remote_code: runs the Python code in the model's directory, for a class that transformers lacks.

    Returns:
        The open model, in eval mode: `module`, `anatomy` (the sites with their units), `task`, `processor`.

    Raises:
        UsageError: for what does not exist, or options that can't go together.
        InputError: for a model that can't be read.
        UnknownArchitecture: where no table describes the model.

    Example:
        >>> import optin_cli as optin
        >>> model = optin.open_model(bert, processor=tokenizer)
        >>> model.family.name, len(model.anatomy.blocks), model.task.name
        ('bert', 2, 'sequence-classification')
    """
    table = read_family(Path(family)) if isinstance(family, str | Path) else family
    if isinstance(model, OpenModel):
        return model
    if not isinstance(model, nn.Module):
        if processor is not None:
            raise UsageError(
                f"{param('processor')} is for a module in memory",
                "a model on disk has one beside its weights",
            )
        return checkpoint.open_model(
            str(model),
            task=task,
            device=device,
            dtype=dtype,
            family=table,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
        )
    if device_map is not None:
        raise UsageError(f"{param('device_map')} is for a model on disk", "open it by its name or directory")
    where = None if device == "auto" else device
    return open_held(model, processor=processor, task=task, device=where, dtype=dtype, family=table)


def silent(done: float, total: float, what: str) -> None:
    """Report no progress."""


def as_path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)
