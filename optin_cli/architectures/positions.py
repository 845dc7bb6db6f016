"""Count the positions that each layer of a hierarchical model sees, by one forward without data.

A stage of such a model has fewer tokens than the one before, and windows pad them: what a layer costs does not
follow from the length of the input. Images, and spectrograms, of such a model have one size: it is counted there.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from optin_cli.errors import InputError
from optin_cli.structure.anatomy import ATTENTION_MASK, AUDIO, IMAGE
from optin_cli.structure.audio_inputs import random_recordings
from optin_cli.structure.hidden_states import as_rows, hidden_of
from optin_cli.structure.layers import replaces_forward

_DEFAULT_SIDE = 224


@dataclass
class Positions:
    """Positions of one image, layer by layer."""

    reference: int = 0
    """Positions in the first block's output: the tokens that `Site.macs_per_unit` takes."""
    rows: dict[str, int] = field(default_factory=dict)
    """Path of a layer -> positions of its output."""
    groups: dict[str, int] = field(default_factory=dict)
    """Path of a Linear -> positions in one row of its input: a window, or all of them."""

    def share(self, path: str) -> float:
        """Positions that a layer sees, relative to the reference; 1 for a layer that does not run."""
        return self.rows.get(path, self.reference) / self.reference

    def group(self, path: str) -> int:
        return self.groups.get(path, self.reference)


def count_positions(model: nn.Module, first_block: str, layout: str, modality: str = IMAGE) -> Positions:
    """Run `model` on an image or spectrogram of its input size, without weights, and look at its Linears and Conv2ds.

    Raises `InputError` if it does not run.
    """
    seen = Positions()
    twin = weightless(model)

    def look(path: str) -> Any:
        def hook(module: nn.Module, _: Any, output: Tensor) -> None:
            conv = not isinstance(module, nn.Linear)
            shape = output.shape[2:] if conv else output.shape[:-1]
            seen.rows[path] = seen.rows.get(path, 0) + shape.numel()
            if not conv and output.dim() > 1:
                seen.groups[path] = output.shape[-2]

        return hook

    def refer(_: nn.Module, __: Any, output: Any) -> None:
        seen.reference = as_rows(hidden_of(output), layout).shape[1]

    with ExitStack() as stack:
        for path, module in twin.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                stack.callback(module.register_forward_hook(look(path)).remove)
            if path == first_block:
                stack.callback(module.register_forward_hook(refer).remove)
        stack.enter_context(torch.no_grad())
        parameter = next(twin.parameters())
        what = "a spectrogram" if modality == AUDIO else "an image"
        try:
            _run(twin, modality, parameter.device, parameter.dtype)
        except (RuntimeError, ValueError, AssertionError, NotImplementedError) as error:
            raise InputError(
                f"{type(model).__name__} does not run on {what} of its own size, so its costs can't be counted: "
                f"{error}"
            ) from error
    return seen


def _run(twin: nn.Module, modality: str, device: torch.device, dtype: torch.dtype) -> None:
    if modality != AUDIO:
        twin(torch.zeros(1, channels(twin), *image_size(twin), device=device, dtype=dtype))
        return
    inputs = random_recordings(twin, 1)
    inputs = {name: value for name, value in inputs.items() if not name.endswith(ATTENTION_MASK)}
    twin(**{k: v.to(device, dtype if v.is_floating_point() else None) for k, v in inputs.items()})


def weightless(model: nn.Module) -> nn.Module:
    """A copy on the meta device, in eval mode; the model itself where its modules can't be copied."""
    if replaces_forward(model):
        return model
    tensors: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        tensors[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    return copy.deepcopy(model, tensors).eval()


def image_size(model: nn.Module) -> tuple[int, int]:
    """(height, width) of the images a model was made for: as configured (transformers) or built (timm)."""
    module: Any = model
    config = getattr(module, "config", None)
    size = getattr(getattr(config, "vision_config", config), "image_size", None)
    size = size or getattr(getattr(module, "patch_embed", None), "img_size", None)
    if size is None:
        size = _settings(module).get("input_size", (3, _DEFAULT_SIDE, _DEFAULT_SIDE))[-2:]
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def channels(model: nn.Module) -> int:
    """Channels of the images a model was made for."""
    module: Any = model
    config = getattr(module, "config", None)
    found = getattr(getattr(config, "vision_config", config), "num_channels", None)
    return int(found or getattr(module, "in_chans", None) or _settings(module).get("input_size", (3,))[0])


def _settings(module: Any) -> dict[str, Any]:
    """Return what timm records of a model's pretraining."""
    return getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None) or {}
