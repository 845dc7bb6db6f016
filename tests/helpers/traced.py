"""Tiny models that are in no table, for the tracer."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from helpers.families import BLOCKS, HEADS, IMAGE_SIZE, INNER, MAX_LENGTH, PATCH_SIZE, WIDTH
from helpers.models import randomise
from helpers.tokenizers import save_tokenizer, vocabulary
from optin_cli.tracing.propose import Proposal, trace
from optin_cli.tracing.record import modality_of, synthetic_inputs

_LAYERS = {
    "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS, "hidden_size": WIDTH, "intermediate_size": INNER,
}  # fmt: skip
_TEXT = {
    **_LAYERS, "vocab_size": len(vocabulary("bert")), "max_position_embeddings": MAX_LENGTH, "pad_token_id": 0,
}  # fmt: skip
_IMAGE = {**_LAYERS, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
_STAGES = {"num_encoder_blocks": 2, "depths": [2, 2], "hidden_sizes": [16, 32]}
_SPECIAL = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3, "mask_token_id": 4}

UNLISTED: dict[str, tuple[str, dict[str, Any]]] = {
    "ernie": ("ErnieModel", _TEXT),
    "nomic": ("NomicBertModel", _TEXT),  # a gate apart
    "mobilebert": (
        "MobileBertModel",
        {**_TEXT, "intra_bottleneck_size": 16, "true_hidden_size": 16, "embedding_size": 16,
         "num_feedforward_networks": 2},
    ),
    "nystromformer": (  # a depthwise convolution over heads
        "NystromformerModel", {**_TEXT, "conv_kernel_size": 3, "num_landmarks": 10, "segment_means_seq_len": 10}
    ),
    "vit_mae": ("ViTMAEModel", {**_IMAGE, "mask_ratio": 0.0}),
    "mobilenet_v2": ("MobileNetV2Model", {"depth_multiplier": 0.35, "image_size": IMAGE_SIZE}),
    "poolformer": (  # what stands between stages is registered before them
        "PoolFormerModel",
        {**_STAGES, "patch_sizes": [7, 3], "strides": [4, 2], "padding": [2, 1]},
    ),
    "granite": ("GraniteModel", {**_TEXT, "num_key_value_heads": 2}),  # two heads of queries to each of keys
    "persimmon": ("PersimmonModel", _TEXT),  # q, k and v of a head side by side
    "phi3": ("Phi3Model", {**_TEXT, **_SPECIAL, "num_key_value_heads": 2}),  # and in one projection
    "albert": ("AlbertModel", {**_TEXT, "embedding_size": 16}),  # listed: its table says what no trace tells
    "bloom": (
        "BloomModel",
        {"vocab_size": 80, "hidden_size": WIDTH, "n_layer": BLOCKS, "n_head": HEADS, "pad_token_id": 0},
    ),
    "convnextv2": (
        "ConvNextV2Model",
        {"hidden_sizes": [16, 32], "depths": [2, 2], "num_stages": 2, "image_size": IMAGE_SIZE},
    ),
    "hiera": (
        "HieraModel",
        {"image_size": [64, 64], "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "mlp_ratio": 2.0,
         "query_stride": [2, 2], "num_query_pool": 1, "masked_unit_size": [8, 8]},
    ),
    "imagegpt": (  # Conv1D
        "ImageGPTModel", {"vocab_size": 80, "n_embd": WIDTH, "n_layer": BLOCKS, "n_head": HEADS, "n_inner": INNER}
    ),
    "xlnet": ("XLNetModel", {"vocab_size": 80, "d_model": WIDTH, "n_layer": 2, "n_head": HEADS}),
    "speech": (
        "ASTModel", {**_LAYERS, "patch_size": 4, "max_length": 16, "num_mel_bins": 16}
    ),
}  # fmt: skip
"""Name -> (class of transformers, its configuration)."""
UNLISTED_TIMM = {"byobnet": "test_byobnet", "coatnet": "test_coatnet"}
"""Name -> timm's own tiny model."""


def new_unlisted(name: str, seed: int = 0) -> nn.Module:
    """A tiny random model in memory."""
    import timm
    import transformers

    if name in UNLISTED_TIMM:
        if not timm.is_model(UNLISTED_TIMM[name]):
            pytest.skip(f"timm {timm.__version__} has no {UNLISTED_TIMM[name]}")
        return randomise(timm.create_model(UNLISTED_TIMM[name], num_classes=5), seed).eval()
    if name == "mixer":
        mixer = timm.models.mlp_mixer.MlpMixer(
            num_classes=5, img_size=IMAGE_SIZE, patch_size=PATCH_SIZE, num_blocks=2, embed_dim=WIDTH
        )
        mixer.pretrained_cfg = {"input_size": (3, IMAGE_SIZE, IMAGE_SIZE)}
        return randomise(mixer, seed).eval()
    class_name, settings = UNLISTED[name]
    cls = getattr(transformers, class_name)
    return randomise(cls(cls.config_class(**settings)), seed).eval()


def library_of(name: str) -> str:
    return "transformers" if name in UNLISTED else "timm"


def trace_module(module: nn.Module, library: str = "transformers") -> Proposal:
    modality = modality_of(module, library, None)
    inputs = synthetic_inputs(module, library, modality)
    return trace(module, inputs, library=library, modality=modality)


@cache
def traced(name: str) -> Proposal:
    """The proposal for a tiny model, made once."""
    return trace_module(new_unlisted(name), library_of(name))


def save_unlisted(name: str, folder: Path, head: str) -> Path:
    """A tiny model with the head of another class of its, and what processes its data."""
    import transformers

    class_name, settings = UNLISTED[name]
    cls = getattr(transformers, class_name.replace("Model", head))
    labels = 5 if "Image" in head else 2
    randomise(cls(cls.config_class(**settings, num_labels=labels))).save_pretrained(folder)
    if "Image" in head:
        size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        transformers.ViTImageProcessor(size=size).save_pretrained(folder)
    else:
        save_tokenizer("bert", folder)
    return folder


def reasons(proposal: Proposal) -> str:
    return "\n".join(f"{gone.where}: {gone.why}" for gone in proposal.left)
