"""Tiny models and data sets that every test shares. Everything is seeded; nothing needs the network.

The models have three blocks, four heads and biases far from zero: an index that is off by one shows in the
output.
"""

from __future__ import annotations

import csv
import json
import shutil
import signal
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from optin_cli.artefacts.latency import LatencyTable, processor_name
from optin_cli.artefacts.ranking import RankedSite, Ranking
from optin_cli.models.anatomy import Anatomy, Site
from optin_cli.models.checkpoint import OpenModel, open_model
from optin_cli.models.tasks import EMBEDDING, QUESTION, TOKEN

TEXT_FAMILIES = ["bert", "roberta", "xlm-roberta", "distilbert", "electra", "mpnet"]
IMAGE_FAMILIES = ["vit", "deit", "timm-vit"]
ALL = [*TEXT_FAMILIES, *IMAGE_FAMILIES]

BLOCKS, HEADS, WIDTH, INNER = 3, 4, 32, 64
IMAGE_SIZE, PATCH_SIZE = 32, 8
MAX_LENGTH = 64
TIMM_NAME = "vit_tiny_patch16_224"

_LAYERS = {"num_hidden_layers": BLOCKS, "num_attention_heads": HEADS, "hidden_size": WIDTH}
_IMAGE = {**_LAYERS, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
_TOWER = {**_IMAGE, "intermediate_size": INNER, "projection_dim": 16}
# a CLIP text model reads its embedding at the highest id when `eos_token_id` is 2
_TEXT_TOWER = {
    **_LAYERS, "intermediate_size": INNER, "projection_dim": 16, "max_position_embeddings": MAX_LENGTH,
    "vocab_size": 80, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 2,
}  # fmt: skip
# 8 x 8 tokens, then 4 x 4: windows are shifted, and windows of 3 padded as well
_SWIN = {
    "image_size": IMAGE_SIZE, "patch_size": 4, "embed_dim": WIDTH, "depths": [2, 2], "num_heads": [HEADS] * 2,
    "mlp_ratio": 2.0, "num_labels": 5,
}  # fmt: skip
MORE_TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "beit": (
        "BeitForImageClassification",
        {**_IMAGE, "intermediate_size": INNER, "num_labels": 5, "use_relative_position_bias": True},
    ),
    "beit-shared": (
        "BeitForImageClassification",
        {
            **_IMAGE, "intermediate_size": INNER, "num_labels": 5, "use_relative_position_bias": True,
            "use_shared_relative_position_bias": True, "use_mean_pooling": False, "layer_scale_init_value": 0.0,
        },
    ),
    "dinov2": ("Dinov2ForImageClassification", {**_IMAGE, "mlp_ratio": 2, "num_labels": 5}),
    "dinov2-swiglu": (
        "Dinov2ForImageClassification", {**_IMAGE, "mlp_ratio": 3, "num_labels": 5, "use_swiglu_ffn": True}
    ),
    "dinov2-registers": (
        "Dinov2WithRegistersForImageClassification", {**_IMAGE, "mlp_ratio": 2, "num_labels": 5}
    ),
    "clip-vision": ("CLIPVisionModel", _TOWER),
    "clip-vision-projected": ("CLIPVisionModelWithProjection", _TOWER),
    "clip-image-classifier": (
        "CLIPForImageClassification",
        {"vision_config": _TOWER, "text_config": _TEXT_TOWER, "num_labels": 5},
    ),
    "clip-text": ("CLIPTextModel", _TEXT_TOWER),
    "clip-text-projected": ("CLIPTextModelWithProjection", _TEXT_TOWER),
    "convnext": (
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 16, 24], "depths": [1, 2, 1], "image_size": IMAGE_SIZE, "num_labels": 5,
         "num_stages": 3},
    ),
    "swin": ("SwinForImageClassification", {**_SWIN, "window_size": 4}),
    "swin-padded": ("SwinForImageClassification", {**_SWIN, "window_size": 3}),
    "swinv2": ("Swinv2ForImageClassification", {**_SWIN, "window_size": 3}),
}  # fmt: skip
MORE_TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "timm-deit-distilled": ("deit_tiny_distilled_patch16_224", {}),
    "timm-deit3": ("deit3_small_patch16_224", {}),  # layer scale
    "timm-clip": ("vit_base_patch32_clip_224", {}),  # norm_pre
    "timm-post-norm": ("vit_base_patch16_rpn_224", {}),  # ResPostBlock, no class token, average pooling
    "timm-registers": ("vit_medium_patch16_reg4_gap_256", {"qk_norm": True}),
    "timm-swiglu": ("vit_giant_patch14_reg4_dinov2", {}),  # gate and value packed
    "timm-eva-rope": ("vit_small_patch16_rope_224", {}),
    "timm-eva-mixed": ("vit_small_patch16_rope_mixed_224", {"qkv_fused": False}),  # a rotation for each head
    "timm-eva02": ("eva02_tiny_patch14_224", {}),
    "timm-dinov3": ("vit_small_plus_patch16_dinov3", {}),  # gate and value apart
    "timm-beit": ("beit_base_patch16_224", {}),
    "timm-swin": ("swin_tiny_patch4_window7_224", {}),
    "timm-swin-padded": ("swin_tiny_patch4_window7_224", {"window_size": 3, "head_dim": 6}),
    "timm-swinv2": ("swinv2_tiny_window8_256", {}),
}
TIMM_CNNS = {
    "timm-resnet": "test_resnet",  # a basic block in a stage, a bottleneck in the next
    "timm-efficientnet": "test_efficientnet",  # fused and plain inverted residuals, squeeze-and-excite
    "timm-convnext": "test_convnext",
}
"""timm's own tiny models."""
TORCHVISION: dict[str, tuple[str, dict[str, Any]]] = {
    "torchvision-mobilenet-v2": (
        "mobilenet_v2",
        {"inverted_residual_setting": [[1, 8, 1, 1], [3, 12, 2, 2]], "width_mult": 0.5},
    ),
}
CNNS = [*TIMM_CNNS, *TORCHVISION, "convnext"]
MORE_FAMILIES = [*MORE_TRANSFORMERS, *MORE_TIMM, *TIMM_CNNS, *TORCHVISION]
"""Further families and variants; tests/models/test_all_families.py checks the promises for each."""

_WORDS = (
    "the a cat dog bird house tree river sits runs sings falls on under near with red small old quiet very "
    "never always good bad fine dull"
)
WORDS = _WORDS.split()
ENDINGS = ["##s", "##ly", "##er"]
_PAD_FIRST = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_PAD_SECOND = [
    "[CLS]",
    "[PAD]",
    "[SEP]",
    "[UNK]",
    "[MASK]",
]  # position ids of RoBERTa and MPNet count on pad = 1

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


def hear_interrupts() -> None:
    """For `preexec_fn`: a shell's background jobs start with Ctrl-C ignored, and so would what a test starts there."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def examples(count: int, shrink: bool = True) -> settings:
    """Decorator of a property test: `count` examples, the same at every run.

    A failing example is shrunk, unless each try is slow.
    """
    phases = [phase for phase in Phase if shrink or phase not in (Phase.shrink, Phase.explain)]
    return settings(max_examples=count, deadline=None, derandomize=True, phases=phases)


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
    if name in TEXT_FAMILIES or name.startswith("clip-text"):
        save_tokenizer(name, folder)
    else:
        _save_image_processor(folder)
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


def _text_config(name: str) -> dict[str, Any]:
    pad = _specials(name).index("[PAD]")
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


def _save_image_processor(folder: Path) -> None:
    from transformers import ViTImageProcessor

    ViTImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(folder)


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
    import timm

    model = timm.create_model(architecture, num_classes=num_classes, **timm_args(architecture, **overrides))
    return randomise(model, seed).eval()


def new_timm_cnn(architecture: str, num_classes: int = 5, seed: int = 0) -> nn.Module:
    """One of timm's convolutional models in memory."""
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


def _specials(name: str) -> list[str]:
    return _PAD_SECOND if name in ("roberta", "xlm-roberta", "mpnet") else _PAD_FIRST


def vocabulary(name: str) -> dict[str, int]:
    """Token -> id of a model's tokenizer."""
    letters = [prefix + letter for prefix in ("", "##") for letter in "bcdefghijklmnopqrstuvwxyz"]
    tokens = dict.fromkeys([*_specials(name), *WORDS, *ENDINGS, *letters])
    return {token: i for i, token in enumerate(tokens)}


def save_tokenizer(name: str, folder: Path) -> None:
    """A small WordPiece tokenizer that AutoTokenizer finds in `folder`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = vocabulary(name)
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    types = ["token_type_ids"] if name in ("bert", "electra") else []
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", *types, "attention_mask"],
        **{f"{key}_token": f"[{key.upper()}]" for key in ("pad", "unk", "cls", "sep", "mask")},
    ).save_pretrained(folder)


_KEEP_ALIVE: list[tempfile.TemporaryDirectory] = []


def new_folder() -> Path:
    """An empty folder that lives as long as the process: for what tests build once and share."""
    _KEEP_ALIVE.append(tempfile.TemporaryDirectory(prefix="optin-test-"))
    return Path(_KEEP_ALIVE[-1].name)


def saved_model(name: str, head: str = "classifier") -> Path:
    """The folder of a tiny model, made once. Only for reading."""
    return _saved_model(name, head)


@cache
def _saved_model(name: str, head: str) -> Path:
    return tiny_model(name, new_folder() / f"{name}-{head}", head)


def shared_model(name: str, head: str = "classifier") -> OpenModel:
    """A tiny model, opened once. Don't change it: copy its module first."""
    return _shared_model(name, head)


@cache
def _shared_model(name: str, head: str) -> OpenModel:
    return open_model(str(saved_model(name, head)), device="cpu")


def sentences(count: int, seed: int = 0, words: tuple[int, int] = (3, 20)) -> list[str]:
    """`count` texts of words that the tiny tokenizers know."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(*words))) for _ in range(count)]


def tiny_text_csv(
    folder: Path,
    rows: int = 60,
    labels: str | None = "class",
    pairs: bool = True,
    seed: int = 0,
    name: str = "train.csv",
) -> Path:
    """A CSV file with `sentence1`, `sentence2` (or just `sentence`) and `label`.

    `labels`: `class` (0 or 1), `name` (negative or positive), `score` (0 to 5), or None for no such column.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed + 1)
    texts = (
        {"sentence1": sentences(rows, seed), "sentence2": sentences(rows, seed + 100)}
        if pairs
        else {"sentence": sentences(rows, seed)}
    )
    classes = rng.integers(0, 2, rows).tolist()
    column = {
        "class": classes,
        "name": [("negative", "positive")[c] for c in classes],
        "score": rng.uniform(0, 5, rows).round(2).tolist(),
        None: None,
    }[labels]
    table = texts if column is None else {**texts, "label": column}
    path = folder / name
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(table)
        writer.writerows(zip(*table.values(), strict=True))
    return path


def tiny_image_folder(
    folder: Path, n: int = 12, classes: Iterable[str] = ("cat", "dog"), seed: int = 0
) -> Path:
    """`n` noisy PNG images, spread over one folder a class."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    names = list(classes)
    for i in range(n):
        target = folder / names[i % len(names)]
        target.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(target / f"{i:03}.png")
    return folder


def random_inputs(model: OpenModel, batch: int = 3, tokens: int = 9, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of `model`: pixels, or texts of which all but the first are padded."""
    generator = torch.Generator().manual_seed(seed)
    if model.family.modality == "image":
        pixels = torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        return {"pixel_values" if model.source.library == "transformers" else "x": pixels}
    config = model.module.config
    ids = torch.randint(5, config.vocab_size, (batch, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, tokens - min(row, tokens - 1) :] = 0
    ids[mask == 0] = config.pad_token_id
    return {"input_ids": ids, "attention_mask": mask}


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
    """Output rows that count, [rows, classes]: what `model`'s task reads from `module`."""
    rows = model.task.output(module, inputs)
    if model.task.name == EMBEDDING:
        return rows[:, 0]
    return rows[model.task.row_weights(inputs).bool()] if model.task.name in (TOKEN, QUESTION) else rows[:, 0]


def tiny_ranking(blocks: int = 3, heads: int = 4, neurons: int = 6, seed: int = 0, **changes: Any) -> Ranking:
    """A ranking of no model in particular, with positive scores that add up from their parts."""
    rng = np.random.default_rng(seed)
    sites = []
    for block in range(blocks):
        for kind, units, width in (("heads", heads, 8), ("neurons", neurons, 1)):
            columns = list(range(block, blocks))
            trajectory, output = rng.exponential(size=(units, len(columns))), rng.exponential(size=units)
            noise = rng.normal(0, 0.1, units)  # of the one batch against the other
            both = np.stack([trajectory.sum(axis=1), output], axis=-1)  # (units, 2)
            sites.append(
                RankedSite(
                    name=f"blocks.{block}.{kind}",
                    kind=kind,
                    block=block,
                    units=units,
                    width=width,
                    macs_per_token=4 * 32 * width if kind == "heads" else 64,
                    macs_per_pair=2 * width if kind == "heads" else 0,
                    params_per_unit=4 * 32 * width + 3 * width if kind == "heads" else 65,
                    score=trajectory.sum(axis=1) + output,
                    trajectory=trajectory,
                    output=output,
                    columns=columns,
                    by_batch=np.stack([both + noise[:, None], both - noise[:, None]]).astype(np.float32),
                )
            )
    facts = {
        "model": {
            "id": "tiny",
            "digest": "m" * 64,
            "family": "bert",
            "task": "embedding",
            "class": "BertModel",
        },
        "data": {"spec": "data.csv", "config": None, "split": "train", "fingerprint": "f" * 64, "rows": 60},
        "row_ids": [1, 4, 9],
        "method": "curvature",
        "settings": {"seed": 0, "probes": 4, "lambda": 1.0},
        "tokens": 11.5,
        "dense": {
            "id": "tiny",
            "digest": "m" * 64,
            "params": 10_000,
            "macs_per_token": sum(s.units * s.macs_per_token for s in sites),
            "macs_per_pair": sum(s.units * s.macs_per_pair for s in sites),
            "site_params": sum(s.units * s.params_per_unit for s in sites),
        },
        "batch_weights": [0.5, 0.5],
        "versions": {"optin": "0.1.0"},
        "created": "2025-01-31T12:00:00",
        "seconds": 1.5,
    }
    return Ranking(**{**facts, "sites": sites, **changes})


def latency_table(sites: Iterable[RankedSite | Site], step: int = 1, **setting: Any) -> LatencyTable:
    """A made-up table of a model with these sites; neurons cost a stair of `step` units, heads a line."""
    curves, facts = [], {}
    for index, site in enumerate(sites):
        counts = np.arange(site.units + 1)
        steps = counts if site.kind == "heads" else -(-counts // step) * step
        curves.append(
            {"counts": counts.tolist(), "ms": (0.001 * site.params_per_unit * steps).tolist(), "noise": 0.0}
        )
        facts[site.name] = {"kind": site.kind, "units": site.units, "curve": index}
    here = {
        "device": "cpu",
        "processor": processor_name(),
        "threads": 1,
        "dtype": "float32",
        "batch_size": 8,
        "size": 16,
    }
    table = LatencyTable(
        model={"id": "m", "digest": "d" * 64, "dense_digest": "d" * 64, "family": "made-up"},
        setting={**here, **setting},
        total_ms=1.0,
        fixed_ms=1.0,
        curves=curves,
        sites=facts,
    )
    table.total_ms = table.model_ms({name: site["units"] for name, site in facts.items()})
    return table


def keep_sets(anatomy: Anatomy) -> st.SearchStrategy[dict[str, list[int]]]:
    """Any kept units of any sites: none, one, some or all of each; a site may be left out (so it stays whole)."""
    return st.fixed_dictionaries({}, optional={site.name: kept_of(site.units) for site in anatomy})


def kept_of(units: int) -> st.SearchStrategy[list[int]]:
    """Ascending indices below `units`; none and just one come up often."""
    every = list(range(units))
    some = st.lists(st.sampled_from(every), unique=True, max_size=units).map(sorted) if units else st.just([])
    one = st.sampled_from(every).map(lambda unit: [unit]) if units else st.just([])
    return st.one_of(st.just([]), one, some, st.just(every))


def opened(folder: Path | str, **options) -> OpenModel:
    return open_model(str(folder), device="cpu", **options)


def same_outputs(one: OpenModel, other: OpenModel) -> bool:
    inputs = random_inputs(one)
    return torch.equal(outputs(one, one.module, inputs), outputs(other, other.module, inputs))


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
