"""Inputs and outputs of models, and how tests run."""

from __future__ import annotations

import copy
import os
import signal

import torch
from hypothesis import Phase, settings
from torch import Tensor, nn

from helpers.families import IMAGE_SIZE
from helpers.flops import flop_counter
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.structure.audio_inputs import random_recordings
from optin_cli.tasks.segmentation import SEGMENTATION


def hear_interrupts() -> None:
    """For `preexec_fn`: a shell's background jobs start with Ctrl-C ignored, and so would what a test starts there."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def examples(count: int, shrink: bool = True) -> settings:
    """Decorator of a property test: `count` examples, the same at every run; a third unless `make test-all` runs.

    A failing example is shrunk, unless each try is slow.
    """
    count = count if os.environ.get("OPTIN_EXAMPLES") == "all" else (count + 2) // 3
    phases = [phase for phase in Phase if shrink or phase not in (Phase.shrink, Phase.explain)]
    return settings(max_examples=count, deadline=None, derandomize=True, phases=phases)


def random_inputs(model: OpenModel, batch: int = 3, tokens: int = 9, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of `model`: pixels, spectrograms (with transcripts), or texts of which all but the first are padded."""
    generator = torch.Generator().manual_seed(seed)
    if model.family.modality == "image":
        size = getattr(getattr(model.module, "config", None), "image_size", None)
        height, width = size if isinstance(size, list) else (IMAGE_SIZE, IMAGE_SIZE)
        pixels = torch.randn(batch, 3, height, width, generator=generator)
        return {"pixel_values" if model.source.library == "transformers" else "x": pixels}
    if model.family.modality == "audio":
        inputs = random_recordings(model.module, batch, generator=generator)
        if (mask := inputs.get("decoder_attention_mask")) is not None:
            for row in range(1, batch):
                mask[row, -row:] = 0
        return inputs
    config = model.module.config
    ids = torch.randint(5, config.vocab_size, (batch, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, tokens - min(row, tokens - 1) :] = 0
    ids[mask == 0] = config.pad_token_id
    inputs = {"input_ids": ids, "attention_mask": mask}
    if len(model.anatomy.streams) > 1:  # the decoder's padding is another
        inputs |= {"decoder_input_ids": ids.flip(0), "decoder_attention_mask": mask.flip(0)}
    return inputs


SWIN_WINDOWS = {
    "swin": (4, False), "swin-padded": (3, False), "timm-swin": (4, True), "timm-swin-padded": (3, True)
}  # fmt: skip
"""Name -> (side of a window, whether an image is shifted before it is padded)."""


def window_rows(name: str, block: int) -> Tensor:
    """Where a tiny Swin has each position of an image, (positions,), among the rows of a block's windows."""
    side, shift = (8 if block < 2 else 4), block in (1, 4)
    window, shifted_first = SWIN_WINDOWS[name]
    step = window // 2 if shift and window < side else 0
    room = -(-side // window) * window - side
    numbers = torch.arange(side * side).view(side, side)
    if shifted_first:
        numbers = numbers.roll((-step, -step), (0, 1))
    grid = nn.functional.pad(numbers, (0, room, 0, room), value=-1)
    if not shifted_first:
        grid = grid.roll((-step, -step), (0, 1))
    cut = grid.unfold(0, window, window).unfold(1, window, window).flatten()  # window by window
    rows = torch.empty(side * side, dtype=torch.long)
    rows[cut[cut >= 0]] = (cut >= 0).nonzero()[:, 0]
    return rows


@torch.no_grad()
def outputs(model: OpenModel, module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Output rows that count, [rows, classes]: what `model`'s task reads from `module`.

    Of maps in float64: tiny random ones have norms that blow rounding up, and thresholds that it may cross. Of T5,
    too: its scores have no scale, and random ones saturate.
    """
    if model.task.name == SEGMENTATION or model.family.name == "t5":
        module = copy.deepcopy(module).double()
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    found = model.task.output(module, inputs)
    return found[model.row_weights(inputs, found).bool()]


def macs_of(model: nn.Module, image: Tensor) -> int:
    """MACs of a forward by torch's own counter."""
    with torch.no_grad(), flop_counter() as counter:
        model(image)
    return counter.get_total_flops() // 2


def same_outputs(one: OpenModel, other: OpenModel) -> bool:
    inputs = random_inputs(one)
    return torch.equal(outputs(one, one.module, inputs), outputs(other, other.module, inputs))
