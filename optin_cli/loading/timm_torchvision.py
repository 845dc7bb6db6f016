"""Open and save models of timm and torchvision: by name, from a checkpoint, or from a folder in timm's layout."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optin_cli.artefacts.files import to_json
from optin_cli.errors import InputError, UsageError
from optin_cli.loading.sources import Source
from optin_cli.loading.weight_errors import misfits, stored_prefix
from optin_cli.tasks.base import Task
from optin_cli.tasks.embedding import EMBEDDING, Embedding
from optin_cli.tasks.sequences import IMAGE, ImageClassification

log = logging.getLogger("optin")

LIBRARIES = ("timm", "torchvision")
Reshape = Callable[[nn.Module], None]
_CLASSES = 1000  # of ImageNet, torchvision's default


def open_vision(
    source: Source, task_name: str | None, reshape: Reshape
) -> tuple[nn.Module, Task, torch.dtype]:
    """A model of one of `LIBRARIES`, reshaped before its weights are read. Its `pretrained_cfg` is timm's.

    Raises `UsageError` for a task it can't do and `InputError` for weights that don't fit.
    """
    from timm.models import load_state_dict

    tasks = (IMAGE, EMBEDDING) if source.library == "timm" else (IMAGE,)
    if task_name not in (None, *tasks):
        raise UsageError(f"a {source.library} model can't do {task_name}", f"use {' or '.join(tasks)}")
    args = dict(source.arguments)
    if task_name == EMBEDDING:
        args["num_classes"] = 0
    files = source.weight_files()
    module = _make(source, args, pretrained=not files and not source.untrained)
    reshape(module)
    stored = torch.float32
    if files:
        state = load_state_dict(str(files[0]), device="cpu", weights_only=True)
        if task_name == EMBEDDING:
            state = {key: value for key, value in state.items() if not key.startswith("head")}
        wanted = module.state_dict()
        if prefix := stored_prefix(wanted.keys() - state.keys(), state.keys() - wanted.keys()):
            log.info("the weights in %s are stored under %r: they are read without it", files[0], prefix)
            state = {key.removeprefix(prefix): value for key, value in state.items()}
        if problems := misfits(wanted, state):
            raise InputError(
                f"{files[0]} does not fit {source.library}'s {source.architecture}: {'; '.join(problems)}",
                f"check the model name and its arguments ({source.library}:NAME?checkpoint=FILE&num_classes=10)",
            )
        module.load_state_dict(state)
        stored = next(t.dtype for t in state.values() if t.is_floating_point())
    return module, vision_task(module.num_classes), stored


def build_vision(source: Source) -> Any:
    """A model as its library builds it from a source's name and arguments, with random weights."""
    return _make(source, dict(source.arguments), pretrained=False)


def _make(source: Source, args: dict[str, Any], pretrained: bool) -> Any:
    return (_make_timm if source.library == "timm" else _make_torchvision)(source, args, pretrained)


def vision_task(classes: int) -> Task:
    """Classification, or of a model without a classifier the embedding that it gives."""
    return ImageClassification(classes=classes) if classes else Embedding(pooling="none")


def num_classes(module: nn.Module) -> int:
    """Classes of a module that may not say so: the outputs of its last Linear or convolution."""
    named = getattr(module, "num_classes", None)
    if isinstance(named, int):
        return named
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    last = layers[-1] if layers else None
    return last.out_features if isinstance(last, nn.Linear) else last.out_channels if last else 0


def _make_timm(source: Source, args: dict[str, Any], pretrained: bool) -> Any:
    import timm

    if not timm.is_model(
        source.architecture.partition(".")[0]
    ):  # else timm would fetch what config.json names
        raise InputError(f"{source.spec}: timm has no model {source.architecture!r}, which config.json names")
    module: Any = timm.create_model(source.architecture, pretrained=pretrained, **args)
    module.pretrained_cfg = {**module.pretrained_cfg, **source.image_cfg, **_built_size(module)}
    return module


def _make_torchvision(source: Source, args: dict[str, Any], pretrained: bool) -> Any:
    """`num_classes`, `num_features` and `pretrained_cfg` are set as timm has them; `image_size` is our argument."""
    from torchvision import models

    args = dict(args)
    side = args.pop("image_size", None)
    takes_size = source.architecture.startswith("vit_")  # the others take any
    weights = models.get_model_weights(source.architecture).DEFAULT
    module: Any = models.get_model(
        source.architecture,
        weights=weights if pretrained else None,
        **args,
        **({"image_size": side} if side and takes_size else {}),
    )
    module.num_classes = args.get("num_classes", _CLASSES)
    module.num_features = _classifier_inputs(module)
    transform = weights.transforms()
    size, resized = side or transform.crop_size[0], transform.resize_size[0]
    module.pretrained_cfg = {
        "input_size": (3, size, size),
        "crop_pct": 1.0 if side else size / resized,  # small images are seen whole
        "interpolation": transform.interpolation.value,
        "mean": tuple(transform.mean),
        "std": tuple(transform.std),
        **source.image_cfg,
    }
    return module


def _classifier_inputs(module: nn.Module) -> int:
    """Inputs of the last Linear; of a classifier without one (SqueezeNet) those of its last convolution."""
    layers = list(module.modules())
    linears = [layer.in_features for layer in layers if isinstance(layer, nn.Linear)]
    return (linears or [layer.in_channels for layer in layers if isinstance(layer, nn.Conv2d)])[-1]


def _built_size(module: Any) -> dict[str, Any]:
    """The input size a model was built for, which `img_size` may have changed: the transform must match it."""
    from timm.layers import PatchEmbed

    embeds = [part for part in module.modules() if isinstance(part, PatchEmbed)]  # MLP-Mixer's is its `stem`
    size = getattr(getattr(module, "patch_embed", embeds[0] if embeds else None), "img_size", None)
    return {"input_size": (3, *size)} if size else {}


def save_vision(folder: Path, module: Any, source: Source) -> None:
    """config.json in the layout timm itself writes and reads (`local-dir:`), and model.safetensors."""
    from safetensors.torch import save_file

    save_vision_config(folder, module, source)
    state = {key: value.contiguous() for key, value in module.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def save_vision_config(folder: Path, module: Any, source: Source) -> None:
    """config.json alone."""
    keep = ("tag", "input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")
    config = {
        **({} if source.library == "timm" else {"library": source.library}),
        "architecture": source.architecture.split(".")[0],
        "num_classes": module.num_classes,
        "num_features": module.num_features,
        "model_args": {k: v for k, v in source.arguments.items() if k != "num_classes"},
        "pretrained_cfg": {
            k: module.pretrained_cfg[k] for k in keep if module.pretrained_cfg.get(k) is not None
        },
    }
    (folder / "config.json").write_text(to_json(config) + "\n")
