"""Tiny random models, saved with what they need and opened. Everything is seeded; nothing needs the network.

The models have three blocks, four heads and biases far from zero: an index that is off by one shows in the
output.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from helpers.families import (
    BLOCKS,
    DECODERS,
    ENCODER_DECODERS,
    HEADS,
    IMAGE_FAMILIES,
    IMAGE_SIZE,
    IMAGE_SIZES,
    INNER,
    MAX_LENGTH,
    MORE_TEXT,
    MORE_TIMM,
    MORE_TRANSFORMERS,
    PATCH_SIZE,
    TEXT_FAMILIES,
    TIMM_CNNS,
    TIMM_NAME,
    TORCHVISION,
    WHISPERS,
    WIDTH,
)
from helpers.tokenizers import save_tokenizer, specials, vocabulary
from helpers.vgg import register_vggs
from optin_cli.loading.checkpoint import OpenModel, open_model

_HEADS = {
    "encoder": "Model",
    "classifier": "ForSequenceClassification",
    "tagger": "ForTokenClassification",
    "reader": "ForQuestionAnswering",
}
_PREFIX = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "distilbert": "DistilBert",
    "electra": "Electra",
    "mpnet": "MPNet",
    "vit": "ViT",
    "deit": "DeiT",
}


def tiny_model(name: str, folder: Path, head: str = "classifier", seed: int = 0, **overrides: Any) -> Path:
    """Save a tiny random model with its tokenizer or image processor into `folder`; returns `folder`.

    `head`: `encoder` (bare), `classifier`, and for text also `tagger` and `reader`. `overrides` go to the config
    (for timm: to `model_args`). Of `MORE_TRANSFORMERS` each has one head, the one its table names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if name in TIMM_CNNS:
        model = new_timm_cnn(TIMM_CNNS[name], 0 if head == "encoder" else 5, seed)
        _save_timm(TIMM_CNNS[name], folder, model, overrides)
        return folder
    if name in TORCHVISION:
        architecture, args = TORCHVISION[name]
        save_torchvision(architecture, folder, new_torchvision(architecture, 5, seed, **args), args)
        return folder
    if name == "timm-vit" or name in MORE_TIMM:
        architecture, args = MORE_TIMM.get(name, (TIMM_NAME, {}))
        args = timm_args(architecture, **{**args, **overrides})
        model = new_timm(architecture, 0 if head == "encoder" else 5, seed, **args)
        _save_timm(architecture, folder, model, args)
        return folder
    model = new_model(name, head, seed, **overrides)
    model.save_pretrained(folder)
    if name in (*TEXT_FAMILIES, *MORE_TEXT, *DECODERS, *ENCODER_DECODERS):
        save_tokenizer(name, folder)
    elif name in WHISPERS:
        save_tokenizer(name, folder)
        _save_feature_extractor(folder)
    else:
        _save_image_processor(folder, IMAGE_SIZES.get(name, IMAGE_SIZE))
    return folder


def new_model(name: str, head: str = "classifier", seed: int = 0, **overrides: Any) -> nn.Module:
    """A tiny transformers model in memory."""
    import transformers

    if name in MORE_TRANSFORMERS:
        class_name, settings = MORE_TRANSFORMERS[name]
        cls = getattr(transformers, class_name)
        return randomise(cls(cls.config_class(**{**settings, **overrides})), seed).eval()
    image = name in IMAGE_FAMILIES
    suffix = "ForImageClassification" if image and head == "classifier" else _HEADS[head]
    cls = getattr(transformers, _PREFIX[name] + suffix)
    settings = _image_config() if image else _text_config(name)
    config = transformers.AutoConfig.for_model(name, **{**settings, **overrides})
    return randomise(cls(config), seed).eval()


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a random value of a size that keeps activations near one, and norms some statistics."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.data = noise * (1.5 / parameter[0].numel() ** 0.5)
        elif bool((parameter == 1).all()):  # the gain of a norm
            parameter.data = 1 + 0.2 * noise
        else:
            parameter.data = 0.3 * noise
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
        elif name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model


def calm(model: nn.Module) -> nn.Module:
    """Give norms some statistics, but leave weights so that forty blocks do not blow rounding errors up."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for key, value in model.state_dict().items():
            if key.endswith("running_var"):
                value.copy_(torch.rand_like(value) + 0.5)
            elif key.endswith("running_mean") or (value.is_floating_point() and value.dim() == 1):
                value.add_(torch.randn_like(value) * 0.1)
    return model


def _text_config(name: str) -> dict[str, Any]:
    pad = specials(name).index("[PAD]")
    sizes = {"vocab_size": len(vocabulary(name)), "pad_token_id": pad, "num_labels": 2}
    if name == "distilbert":
        return {
            **sizes,
            "dim": WIDTH,
            "n_layers": BLOCKS,
            "n_heads": HEADS,
            "hidden_dim": INNER,
            "max_position_embeddings": MAX_LENGTH,
        }
    return {
        **sizes,
        "hidden_size": WIDTH,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": HEADS,
        "intermediate_size": INNER,
        "max_position_embeddings": MAX_LENGTH + (2 if pad == 1 else 0),
        **({"embedding_size": 16} if name == "electra" else {}),
    }


def _image_config() -> dict[str, Any]:
    return {
        "hidden_size": WIDTH,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": HEADS,
        "intermediate_size": INNER,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "num_labels": 5,
    }


def _save_image_processor(folder: Path, side: int) -> None:
    from transformers import ViTImageProcessor

    ViTImageProcessor(size={"height": side, "width": side}).save_pretrained(folder)


def _save_feature_extractor(folder: Path) -> None:
    """One second becomes 100 frames of 8 bins."""
    from transformers import WhisperFeatureExtractor

    WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(folder)


def timm_args(architecture: str = TIMM_NAME, **overrides: Any) -> dict[str, Any]:
    """Arguments that make a timm model as small as the other models."""
    if architecture.startswith("swin"):
        sizes = {"img_size": IMAGE_SIZE, "patch_size": 4, "embed_dim": WIDTH, "depths": (2, 2)}
        return {**sizes, "num_heads": (HEADS, HEADS), "window_size": 4, "mlp_ratio": 2.0, **overrides}
    return {
        "img_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "embed_dim": 48,
        "depth": BLOCKS,
        "num_heads": HEADS,
        "mlp_ratio": 2.0,
        **overrides,
    }


def new_timm_vit(num_classes: int = 5, seed: int = 0, **overrides: Any) -> nn.Module:
    """A tiny timm VisionTransformer in memory."""
    return new_timm(TIMM_NAME, num_classes, seed, **overrides)


def new_timm(architecture: str, num_classes: int = 5, seed: int = 0, **overrides: Any) -> nn.Module:
    """A tiny timm model of any architecture that takes the arguments of a VisionTransformer or a Swin."""
    register_vggs()
    import timm

    model = timm.create_model(architecture, num_classes=num_classes, **timm_args(architecture, **overrides))
    return randomise(model, seed).eval()


def new_timm_cnn(architecture: str, num_classes: int = 5, seed: int = 0) -> nn.Module:
    """One of timm's convolutional models in memory."""
    register_vggs()
    import timm

    return randomise(timm.create_model(architecture, num_classes=num_classes), seed).eval()


def _save_timm(architecture: str, folder: Path, model: Any, args: dict[str, Any]) -> None:
    config = {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "model_args": args,
        "pretrained_cfg": {
            "input_size": [3, IMAGE_SIZE, IMAGE_SIZE],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": [0.4, 0.5, 0.6],
            "std": [0.2, 0.25, 0.3],
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


def new_torchvision(architecture: str, num_classes: int = 5, seed: int = 0, **args: Any) -> Any:
    """A random torchvision classifier in memory."""
    register_vggs()
    from torchvision import models

    model = models.get_model(architecture, weights=None, num_classes=num_classes, **args)
    return randomise(model, seed).eval()


def save_torchvision(architecture: str, folder: Path, model: Any, args: dict[str, Any]) -> None:
    """A torchvision model in the layout of a pruned directory."""
    config = {
        "library": "torchvision",
        "architecture": architecture,
        "num_classes": 5,
        "model_args": {**args, "image_size": IMAGE_SIZE},
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


_KEEP_ALIVE: list[tempfile.TemporaryDirectory] = []


def new_folder() -> Path:
    """An empty folder that lives as long as the session: for what tests build once and share."""
    _KEEP_ALIVE.append(tempfile.TemporaryDirectory(prefix="optin-test-"))
    return Path(_KEEP_ALIVE[-1].name)


def remove_folders() -> None:
    """Remove all of them: workers of a session end without their finalizers."""
    while _KEEP_ALIVE:
        _KEEP_ALIVE.pop().cleanup()


def saved_model(name: str, head: str = "classifier", blocks: int = BLOCKS) -> Path:
    """The folder of a tiny model, made once. Only for reading. `blocks`: of a transformers model with one stack."""
    return _saved_model(name, head, blocks)


@cache
def _saved_model(name: str, head: str, blocks: int) -> Path:
    overrides = {} if blocks == BLOCKS else {"num_hidden_layers": blocks}
    return tiny_model(name, new_folder() / f"{name}-{head}", head, **overrides)


def shared_model(name: str, head: str = "classifier", blocks: int = BLOCKS) -> OpenModel:
    """A tiny model, opened once. Don't change it: copy its module first."""
    return _shared_model(name, head, blocks)


@cache
def _shared_model(name: str, head: str, blocks: int) -> OpenModel:
    return open_model(str(saved_model(name, head, blocks)), device="cpu")


def opened(folder: Path | str, **options) -> OpenModel:
    return open_model(str(folder), device="cpu", **options)


def copy_of(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target, dirs_exist_ok=True)
    return target


def in_dtype(folder: Path, target: Path, dtype: str) -> Path:
    """A copy of a model directory with its weights in another dtype."""
    copy_of(folder, target)
    weights = {k: v.to(getattr(torch, dtype)) for k, v in load_file(folder / "model.safetensors").items()}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    if "model_type" in config:
        (target / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
    return target
