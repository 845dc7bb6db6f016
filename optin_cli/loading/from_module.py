"""A module that the caller holds, opened without touching it.

What is scored and measured is a twin: other modules, in eval mode and without gradients, over the same memory. The
caller's module keeps its mode, its hooks, its `requires_grad` and its config; its weights are changed by nobody who
does not ask for it. What prunes works on a copy.
"""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from optin_cli.architectures.families import Family, family_from_dict
from optin_cli.architectures.resolve import dissect, family_of
from optin_cli.errors import InputError, UsageError
from optin_cli.loading.checkpoint import DTYPES, OpenModel, pick_device
from optin_cli.loading.reshaping import merging_in, recorded_in, remember
from optin_cli.loading.sources import Source, refuse_quantised
from optin_cli.loading.stock import sized
from optin_cli.loading.timm_torchvision import LIBRARIES, num_classes, vision_task
from optin_cli.structure.layers import replaces_forward
from optin_cli.tasks.base import Task
from optin_cli.tasks.registry import TASKS, task_from_config
from optin_cli.tasks.sequences import IMAGE, SEQUENCE

_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip


def open_held(
    module: nn.Module,
    *,
    processor: Any = None,
    task: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    family: Family | None = None,
) -> OpenModel:
    """Open a module in memory, which stays as it is. Its weights are shared, not copied, unless they are moved.

    `processor` is what makes its inputs from data; batches of tensors need none. `device` and `dtype` are those of
    the module unless given. Raises `UsageError`, `InputError` or `UnknownArchitecture`.
    """
    original = getattr(module, "_orig_mod", module)  # what torch.compile wraps
    if replaces_forward(original):
        raise InputError(
            f"a {type(original).__name__} has modules whose forward is replaced (spread over devices?): a copy of it "
            "would run the original",
            "open it by its name or folder",
        )
    if quantisation := getattr(getattr(original, "config", None), "quantization_config", None):
        refuse_quantised(
            f"the {type(original).__name__}",
            vars(quantisation) if hasattr(quantisation, "__dict__") else quantisation,
        )
    twin = _copied(original, share=True).eval()
    stored = next((p.dtype for p in twin.parameters()), torch.float32)
    if dtype not in ("auto", *DTYPES):
        raise UsageError(f"unknown dtype {dtype!r}", f"use auto, {', '.join(DTYPES)}")
    if device is not None:
        twin.to(pick_device(device))
    if dtype != "auto" and stored != DTYPES[dtype]:
        twin.to(DTYPES[dtype])
    library = _library(original)
    if library == "torchvision":
        _name_as_timm(twin)
    record = recorded_in(twin)
    if record is not None:
        family = family_from_dict(record.family, "its family")
    else:
        family = family_of(twin, family)
    found_task = _task(twin, library, task, family.modality)
    if found_task.reads_stages:
        family = replace(family, chained=False)
    architecture = (
        str(getattr(twin, "pretrained_cfg", {}).get("architecture", "")) if library == "timm" else ""
    )
    arguments = {"num_classes": twin.num_classes} if library == "timm" else {}
    source = Source(
        type(original).__name__, library, architecture=architecture, arguments=arguments, in_memory=True,
        record=record,
    )  # fmt: skip
    return OpenModel(
        source,
        twin,
        family,
        dissect(twin, family),
        found_task,
        stored,
        merging_in(twin),
        given=processor,
        original=original,
    )


def copy_of(model: OpenModel) -> OpenModel:
    """Return the same open model with copied weights, to be pruned while the first one stays."""
    memo = _hooks_of(model.module)
    module, merging = copy.deepcopy((model.module, model.merging), memo)
    parts = {field.name: getattr(model, field.name) for field in fields(OpenModel)}
    return OpenModel(**parts | {"module": module, "merging": merging})


def _copied(module: nn.Module, share: bool) -> Any:
    """Return other modules whose Parameters share the memory and take no gradients."""
    memo = _hooks_of(module)
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.detach()
    return copy.deepcopy(module, memo)


def _hooks_of(module: nn.Module) -> dict[int, Any]:
    """Id -> hook, for a copy to have the very same: a copy of a caller's hook may copy all that hangs on it.

    Our own are copied: those that merge tokens know what runs where.
    """
    found = {}
    for part in module.modules():
        for name in _HOOKS:
            for hook in getattr(part, name, {}).values():
                if not type(hook).__module__.startswith(("optin_cli.", "transformers_modules.")):
                    found[id(hook)] = hook
    return found


def _library(module: nn.Module) -> str:
    """Who could open it again: `transformers`, `timm`, `torchvision`, or ''."""
    home = type(module).__module__.partition(".")[0]
    if home in LIBRARIES:
        return home
    return "transformers" if hasattr(module, "save_pretrained") and hasattr(module, "config") else ""


def _task(module: Any, library: str, name: str | None, modality: str) -> Task:
    """Return the task of a module: by its class, or as named."""
    if library == "transformers":
        module.config.architectures = [type(module).__name__]
        return task_from_config(module.config, None, name)
    if library in LIBRARIES and name is None:
        return vision_task(module.num_classes)
    chosen = name or (IMAGE if modality == "image" else SEQUENCE)
    if chosen not in TASKS:
        raise UsageError(f"unknown task {chosen!r}", f"choose one of {', '.join(TASKS)}")
    return TASKS[chosen](classes=num_classes(module))


def _name_as_timm(module: Any) -> None:
    """Give a twin of a torchvision model what timm's have: the classes, and the settings of its transform."""
    module.num_classes = num_classes(module)
    side = getattr(module, "image_size", 224)
    settings: dict[str, Any] = {
        "input_size": (3, side, side),
        "interpolation": "bilinear",
        "crop_pct": 224 / 256,
    }
    settings |= {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    if not hasattr(module, "pretrained_cfg"):
        module.pretrained_cfg = settings


def into_original(
    pruned: OpenModel, keep: dict[str, list[int]], ranks: dict[str, int], model: OpenModel
) -> None:
    """Make the caller's module, which `model` was opened from, the pruned one, in place.

    Its mode, hooks and `requires_grad` stay; its parameters are new, smaller ones.
    """
    from optin_cli.transforms.slicing import slice_model
    from optin_cli.transforms.token_merging import install_merges

    assert model.original is not None
    if model.merging:
        model.merging.remove()
    stock = pruned.record is not None and pruned.record.is_stock
    slice_model(model.original, model.anatomy.cut(ranks), keep, uniform=stock)
    state: dict[str, Tensor] = pruned.module.state_dict()
    model.original.load_state_dict(state)
    if any(pruned.merges):
        install_merges(model.original, pruned.anatomy, pruned.merges)
    if pruned.record is not None and pruned.source.library == "transformers":
        if stock:
            sized(model.original, pruned.anatomy, pruned.source)
        remember(model.original, pruned.record)
