"""Random inputs of a size: what a size of texts, images and recordings is, a model's own, and which it takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from optin_cli.architectures.positions import image_size
from optin_cli.data.batches import Batch
from optin_cli.errors import UsageError, param
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.loading.processors import TextProcessor
from optin_cli.structure.anatomy import ATTENTION_MASK, AUDIO, IMAGE, TEXT
from optin_cli.structure.audio_inputs import has_decoder, random_recordings, sizes

DEFAULT_LENGTH = 128

Inputs = dict[str, Tensor]


def default_size(model: OpenModel) -> int:
    """128 tokens, or fewer if the model takes fewer; the side of the images a vision model was made for; 64 tokens of
    a transcript, or the frames of a spectrogram."""
    return _KINDS[model.family.modality].default(model)


def check_setting(model: OpenModel, batch_size: int, size: int) -> None:
    """Raise `UsageError` if the model can't run the setting."""
    if batch_size < 1 or size < 1:
        raise UsageError(f"batch size {batch_size} at size {size}: both are at least 1")
    _KINDS[model.family.modality].check(model, size)


def dummy_inputs(model: OpenModel, batch_size: int, size: int, seed: int = 0) -> Inputs:
    """Random inputs on the model's device: (batch, size) tokens without padding, (batch, 3, h, w) pixels or
    spectrograms.

    Raises `UsageError` for a size the model can't take.
    """
    check_setting(model, batch_size, size)
    return draw(model, batch_size, size, seed)


def draw(model: OpenModel, batch_size: int, size: int, seed: int) -> Inputs:
    """`dummy_inputs` of a setting that is checked."""
    inputs = _KINDS[model.family.modality].draw(model, batch_size, size, Generator().manual_seed(seed))
    return Batch(inputs, None, []).to(model.device, model.dtype).inputs


# texts: a size is a length in tokens


def _length(model: OpenModel) -> int:
    assert isinstance(model.processor, TextProcessor)
    return min(DEFAULT_LENGTH, model.processor.max_length)


def _check_length(model: OpenModel, size: int) -> None:
    assert isinstance(model.processor, TextProcessor)
    if size > (most := model.processor.max_length):
        raise UsageError(
            f"{model.spec} takes sequences of up to {most} tokens, not {size}",
            f"use {param('seq_len', most)} or less",
        )


def _tokens(model: OpenModel, batch_size: int, size: int, generator: Generator) -> Inputs:
    assert isinstance(model.processor, TextProcessor)
    tokenizer = model.processor.tokenizer
    vocabulary = getattr(model.module.config, "vocab_size", None) or len(tokenizer)
    ids = torch.arange(vocabulary)
    # a padding id among the tokens would shift the positions of some models
    plain = ids[~torch.isin(ids, torch.tensor(tokenizer.all_special_ids, dtype=torch.long))]
    ids = plain if len(plain) else ids
    picked = ids[torch.randint(len(ids), (batch_size, size), generator=generator)]
    inputs = {}
    for stream in model.anatomy.streams:  # an encoder's and a decoder's, of one length
        inputs[f"{stream.mask.removesuffix(ATTENTION_MASK)}input_ids"] = picked
        inputs[stream.mask] = torch.ones_like(picked)
    if "token_type_ids" in tokenizer.model_input_names:
        inputs["token_type_ids"] = torch.zeros_like(picked)
    return inputs


# images: a size is a side in pixels


def _check_side(model: OpenModel, size: int) -> None:
    """Convolutions take any size, position embeddings often one: ask the model itself."""
    height, width = image_size(model.module)
    if size == height:
        return
    try:
        with torch.inference_mode():
            model.run(draw(model, 1, size, 0))
    except (ValueError, RuntimeError, AssertionError) as error:
        raise UsageError(
            f"{model.spec} takes images of {height} x {width} pixels, not {size} x {size}",
            f"use size {height}",
        ) from error


def _pixels(model: OpenModel, batch_size: int, size: int, generator: Generator) -> Inputs:
    name = next(iter(inspect.signature(model.module.forward).parameters))
    height, width = image_size(model.module)
    shape = (height, width) if size == height else (size, size)
    return {name: torch.randn(batch_size, 3, *shape, generator=generator)}


# recordings: a size is a length of the transcript in tokens; without one, in frames


def _check_recording(model: OpenModel, size: int) -> None:
    most, decoder = sizes(model.module)[1], has_decoder(model.module)
    if size > most or (size < most and not decoder):
        raise UsageError(
            f"{model.spec} takes transcripts of up to {most} tokens, not {size}"
            if decoder
            else f"{model.spec} takes spectrograms of {most} frames, not {size}",
            f"use {param('seq_len', most)}",
        )


@dataclass(frozen=True)
class _Kind:
    """The differences between the kinds of examples that models read."""

    default: Callable[[OpenModel], int]
    check: Callable[[OpenModel, int], None]
    draw: Callable[[OpenModel, int, int, Generator], Inputs]


_KINDS = {
    TEXT: _Kind(_length, _check_length, _tokens),
    IMAGE: _Kind(lambda model: image_size(model.module)[0], _check_side, _pixels),
    AUDIO: _Kind(
        lambda model: sizes(model.module)[0],
        _check_recording,
        lambda model, *setting: random_recordings(model.module, *setting),
    ),
}
