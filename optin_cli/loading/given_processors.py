"""Tokenizers, image processors, feature extractors and transforms that the caller gives beside a module."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import torch

from optin_cli.errors import UsageError
from optin_cli.loading.audio_processors import given_audio_processor
from optin_cli.loading.processors import ImageProcessor, processing, tokenizing


def given_processor(given: Any, module: torch.nn.Module, modality: str, folder: Path | None = None) -> Any:
    """Prepare what the caller gave beside a module: a tokenizer, an image processor or a feature
    extractor of transformers, a `ProcessorMixin` of them, or a transform PIL image -> (3, h, w) tensor.

    `folder` is the directory that the module is from, if it is from one: it may limit the length of texts.

    Raises `UsageError` for what does not go with the modality.
    """
    config = getattr(module, "config", None)
    first = next(iter(inspect.signature(module.forward).parameters))
    if modality == "text":
        tokenizer = copy.deepcopy(getattr(given, "tokenizer", given))  # the caller's keeps its padding side
        if not hasattr(tokenizer, "pad"):
            raise UsageError(f"a {type(given).__name__} is not a tokenizer", "this model reads text")
        return tokenizing(tokenizer, config, folder)
    if modality == "audio":
        return given_audio_processor(given, config)
    processor = getattr(given, "image_processor", given)
    if hasattr(processor, "image_mean") or hasattr(processor, "post_process_semantic_segmentation"):
        return processing(processor, config, type(processor).__name__)
    if not callable(processor):
        raise UsageError(f"a {type(given).__name__} is not a transform of images", "this model reads images")
    return ImageProcessor(processor, first)
