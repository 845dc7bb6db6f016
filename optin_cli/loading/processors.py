"""Processors that turn raw examples into model inputs, from the model's directory or config.

A text processor tokenizes; an image processor maps a PIL image to a (3, h, w) tensor. The data room batches.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from optin_cli.artefacts.kinds import load_json
from optin_cli.data.batches import DECODER, IGNORE, MASK
from optin_cli.data.readers import Window, masked_positions
from optin_cli.errors import InputError, first_line, param
from optin_cli.interrupts import silence
from optin_cli.loading.custom_code import check_part
from optin_cli.loading.weight_errors import is_panic

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger("optin")
_STRIDE = 128  # tokens that two windows on one context share: the doc stride of the SQuAD scripts


@dataclass
class TextProcessor:
    """A tokenizer and the longest sequence the model takes."""

    tokenizer: Any
    max_length: int
    start: int | None = None
    """The token that an encoder-decoder's decoder begins with; None for any other model."""
    vocabulary: int | None = None
    """Tokens that the model knows; None where its config does not say."""

    def tokenize(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, max_length: int | None = None
    ) -> list[dict[str, list[int]]]:
        """Token ids of each text (or pair), truncated, not padded."""
        limit = min(self.max_length, max_length or self.max_length)
        encoded = self.tokenizer(
            list(texts), None if pairs is None else list(pairs), truncation=True, max_length=limit
        )
        return [{key: encoded[key][i] for key in encoded} for i in range(len(texts))]

    def tokenize_words(self, words: Sequence[str], max_length: int | None = None) -> tuple[dict, list]:
        """Token ids of a pre-split sentence, and for each token the index of its word (None for specials)."""
        limit = min(self.max_length, max_length or self.max_length)
        encoded = self.tokenizer(list(words), is_split_into_words=True, truncation=True, max_length=limit)
        return dict(encoded), encoded.word_ids()

    def windows(
        self, questions: Sequence[str], contexts: Sequence[str], max_length: int
    ) -> Iterator[tuple[int, dict[str, list[int]], Window]]:
        """Each question with runs of its context that overlap by 128 tokens: (pair, token ids, what they show).

        Where a question leaves little room, runs overlap by half of it; a question is cut to half of `max_length`.
        """
        limit = min(self.max_length, max_length)
        specials = self.tokenizer.num_special_tokens_to_add(pair=True)
        lengths = [len(ids) for ids in self.tokenizer(list(questions), add_special_tokens=False)["input_ids"]]
        most = (limit - specials) // 2
        for pair, (question, context) in enumerate(zip(questions, contexts, strict=True)):
            if lengths[pair] > most:
                question = self._cut(question, most)
            room = limit - specials - min(lengths[pair], most)
            encoded = self.tokenizer(
                question, context, truncation="only_second", max_length=limit,
                stride=min(_STRIDE, room // 2), return_overflowing_tokens=True, return_offsets_mapping=True,
            )  # fmt: skip
            for number, ids in enumerate(encoded["input_ids"]):
                inputs = {
                    key: encoded[key][number] for key in self.tokenizer.model_input_names if key in encoded
                }
                sides = np.array([side == 1 for side in encoded.sequence_ids(number)])
                offsets = np.where(sides[:, None], np.array(encoded["offset_mapping"][number]), -1)
                cls = self.tokenizer.cls_token_id
                yield pair, inputs, Window(offsets, ids.index(cls) if cls in ids else 0)

    def running_text(self, texts: Sequence[str], max_length: int) -> list[dict[str, list[int]]]:
        """Texts, one after the other, as windows of one length, at most `max_length` tokens.

        Each begins with the token that the tokenizer puts in front of a text, if it does. Fewer tokens than there
        are windows are left over at the end.
        """
        limit = min(self.max_length, max_length)
        begin = self.tokenizer.bos_token_id
        front = [begin] if begin is not None and self.tokenizer("")["input_ids"][:1] == [begin] else []
        encoded = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        ids = [token for text in encoded for token in text]
        count = -(-len(ids) // max(1, limit - len(front)))
        length = len(ids) // max(1, count)
        windows = [front + ids[i * length : (i + 1) * length] for i in range(count)]
        return [{"input_ids": window, MASK: [1] * len(window)} for window in windows]

    def masked(
        self, rows: Sequence[dict[str, list[int]]]
    ) -> tuple[list[dict[str, list[int]]], list[list[int]]]:
        """Rows with some tokens masked, and what was there: `IGNORE` for special tokens, which stay.

        Raises `InputError` if there is no mask token.
        """
        mask = self.tokenizer.mask_token_id
        if mask is None:
            raise InputError(
                "the tokenizer has no mask token, so words can't be hidden from a masked language model",
                f"add it to the tokenizer (mask_token), or leave the head out: {param('task', 'embedding')}",
            )
        specials = set(self.tokenizer.all_special_ids)
        found, hidden = [], []
        for row in rows:
            ids = list(row["input_ids"])
            labels = [
                IGNORE if ids[i] in specials else ids[i] for i in masked_positions(len(ids)) if i < len(ids)
            ]
            for position, label in zip(masked_positions(len(ids)), labels, strict=False):
                ids[position] = ids[position] if label == IGNORE else mask
            found.append({**row, "input_ids": ids})
            hidden.append(labels)
        return found, hidden

    def with_targets(
        self, texts: Sequence[str], targets: Sequence[str], max_length: int | None
    ) -> tuple[list[dict[str, list[int]]], list[list[int]]]:
        """Texts with what the decoder reads of their targets, all but the last token; and the targets' token ids."""
        read, wanted = self.decoded(targets, max_length)
        inputs = self.tokenize(texts, None, max_length)
        return [{**row, **more} for row, more in zip(inputs, read, strict=True)], wanted

    def decoded(
        self, targets: Sequence[str], max_length: int | None
    ) -> tuple[list[dict[str, list[int]]], list[list[int]]]:
        """Return what the decoder reads of targets, all but the last token; and the targets' token ids."""
        limit = min(self.max_length, max_length or self.max_length)
        wanted = self.tokenizer(text_target=list(targets), truncation=True, max_length=limit)["input_ids"]
        start = self.tokenizer.pad_token_id if self.start is None else self.start
        # some tokenizers put the token that the decoder begins with in front themselves
        wanted = [ids[1:] if ids[:1] == [start] else ids for ids in wanted]
        read = [
            {"decoder_input_ids": [start, *ids[:-1]], "decoder_attention_mask": [1] * len(ids)}
            for ids in wanted
        ]
        return read, wanted

    def _cut(self, text: str, tokens: int) -> str:
        """The first `tokens` tokens of a text."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return text[: encoded["offset_mapping"][tokens - 1][1]]

    def pad(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """Pad rows to the longest, as tensors of shape (rows, longest). A decoder's inputs are padded apart."""
        found: dict[str, Tensor] = {}
        for prefix in ("", DECODER):
            names = [key for key in rows[0] if key.startswith(DECODER) == bool(prefix)]
            if names:
                part = [{key.removeprefix(prefix): row[key] for key in names} for row in rows]
                batch = self.tokenizer.pad(part, return_tensors="pt")
                self._check_known(batch["input_ids"])
                found |= {f"{prefix}{key}": batch[key] for key in batch}
        return found

    def _check_known(self, ids: Tensor) -> None:
        largest = int(ids.max()) if ids.numel() else 0
        if self.vocabulary is not None and largest >= self.vocabulary:
            raise InputError(
                f"the tokenizer gives token {largest} ({self.tokenizer.convert_ids_to_tokens(largest)!r}), and the "
                f"model knows {self.vocabulary} tokens",
                "take the tokenizer that belongs to the model, or give the model embeddings for the tokens that were "
                "added (resize_token_embeddings) and save both",
            )


@dataclass
class ImageProcessor:
    """A transform PIL image -> (3, h, w) float tensor, and the name of the model's input. It can be pickled."""

    transform: Any
    input_name: str

    def __call__(self, image: Image) -> Tensor:
        return self.transform(image.convert("RGB"))

    @property
    def reduces_labels(self) -> bool:
        """Return whether 0 is void in label maps, and every other id is one lower in the model."""
        return bool(getattr(getattr(self.transform, "processor", None), "do_reduce_labels", False))

    def follow(self, ids: np.ndarray, void: int) -> Tensor:
        """A label map (height, width) at the size and crop of the model's images: the nearest pixel's id."""
        return self.transform.follow(ids, void)


def text_processor(folder: Path, config: Any, trust_remote_code: bool = False) -> TextProcessor:
    """The tokenizer of a transformers model directory.

    Raises `InputError` when the directory has none.
    """
    from transformers import AutoTokenizer

    try:
        check_part(folder, "tokenizer", trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=trust_remote_code)
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise ValueError("it holds no vocabulary")  # transformers makes one of special tokens alone
        processor = tokenizing(tokenizer, config, folder)
        with _unreported():
            processor.tokenize(["a b"])
        return processor
    except InputError:
        raise
    except BaseException as error:  # the tokenizers library raises nothing more specific
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        raise InputError(
            f"{folder} has no usable tokenizer: {first_line(error)}",
            "put tokenizer.json (or the vocabulary files) beside config.json",
        ) from error


@contextmanager
def _unreported() -> Iterator[None]:
    """Within the context, what libraries in Rust write to standard error before they raise is dropped."""
    stream = os.dup(2)
    try:
        silence(2)
        yield
    finally:
        os.dup2(stream, 2)
        os.close(stream)


def tokenizing(tokenizer: Any, config: Any, folder: Path | None = None) -> TextProcessor:
    """A tokenizer, set to pad on the right and to say where, with the longest sequence that its model takes."""
    tokenizer.padding_side = "right"  # a decoder counts positions from the first token, whatever it is
    names = tokenizer.model_input_names
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"its model_input_names are {names!r}")
    if MASK not in names:
        tokenizer.model_input_names = [*names, MASK]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = _stand_in(tokenizer)
    start = getattr(config, "decoder_start_token_id", None)
    parts = _parts(config)
    known = [size for part in parts if (size := getattr(part, "vocab_size", None))]
    vocabulary = min(known, default=None)
    return TextProcessor(tokenizer, _max_length(folder, tokenizer, config), start, vocabulary)


def _stand_in(tokenizer: Any) -> str | None:
    """The token to pad with where there is none for it: one that ends no text, so that its last token can be told."""
    usual = [token for token in (tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token) if token]
    ends = tokenizer("")["input_ids"][-1:]
    return next((t for t in usual if [tokenizer.convert_tokens_to_ids(t)] != ends), *usual[:1] or [None])


def settle_padding(folder: Path, module: Any, trust_remote_code: bool = False) -> None:
    """Give the config of a classifier that reads the last token a padding token, if it has none: the tokenizer's.

    Without one transformers takes single texts alone.
    """
    config = module.config.get_text_config()
    named = type(module).__name__.endswith("ForSequenceClassification")
    if not named or getattr(config, "pad_token_id", None) is not None:
        return
    try:
        tokenizer = text_processor(folder, module.config, trust_remote_code).tokenizer
    except InputError:  # whoever reads texts is told so
        return
    config.pad_token_id = tokenizer.pad_token_id
    log.info(
        "config.json in %s names no pad_token_id: taking %r, which a pruned model's config.json names too",
        folder,
        tokenizer.pad_token,
    )


def _max_length(folder: Path | None, tokenizer: Any, config: Any) -> int:
    positions = min(_positions(part) or 512 for part in _parts(config))
    limits = [positions, tokenizer.model_max_length]
    sentence = folder and folder / "sentence_bert_config.json"
    if sentence and sentence.is_file():
        stored = load_json(sentence)
        limits.append((stored.get("max_seq_length") if isinstance(stored, dict) else None) or positions)
    if odd := [limit for limit in limits if type(limit) not in (int, float) or not limit >= 1]:
        raise ValueError(f"its longest sequence is {odd[0]!r}")
    return int(min(limits))


def most_positions(config: Any) -> int | None:
    """The longest text, in tokens, that a model has positions for; None where its config names no limit."""
    return min(filter(None, map(_positions, _parts(config))), default=None)


def _parts(config: Any) -> list[Any]:
    """The configs of an encoder and a decoder that a model is made of; else its own."""
    parts = [getattr(config, name, None) for name in ("encoder", "decoder")]
    return [part for part in parts if hasattr(part, "model_type")] or [config]


def _positions(config: Any) -> int | None:
    named = ("max_position_embeddings", "max_target_positions")
    positions = next(filter(None, (getattr(config, name, None) for name in named)), None)
    after_padding = getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "camembert", "mpnet")
    return (
        positions - 2 if positions and after_padding else positions
    )  # position ids start after the padding index


def transformers_image_processor(
    folder: Path, config: Any, trust_remote_code: bool = False
) -> ImageProcessor:
    """The image processor of a transformers model directory; a plain resize and 0.5 normalisation without one.

    Images get the size that the config fixes, also where the processor is set up for another.
    """
    from transformers import AutoImageProcessor, ViTImageProcessor

    check_part(folder, "image processor", trust_remote_code)
    try:
        try:
            processor = AutoImageProcessor.from_pretrained(
                folder, config=config, trust_remote_code=trust_remote_code
            )
        except (OSError, ValueError):
            if (folder / "preprocessor_config.json").is_file():
                raise
            size = _pair(getattr(getattr(config, "vision_config", config), "image_size", 224))
            processor = ViTImageProcessor(size={"height": size[0], "width": size[1]})
        return processing(processor, config, str(folder))
    except Exception as error:  # whatever its file holds
        raise InputError(
            f"{folder} has no usable image processor: {first_line(error)}",
            "take the preprocessor_config.json that came with the model",
        ) from error


def processing(processor: Any, config: Any, where: str) -> ImageProcessor:
    """An image processor of transformers, made to give images of the size that the config fixes."""
    transform = _Transform(processor)
    fixed = getattr(config, "image_size", None)
    if fixed is not None:
        found = tuple(transform(_wide(_pair(fixed))).shape[-2:])
        if found != _pair(fixed):
            log.info(
                "%s is set up for images of %s, its model for %s: taking that", where, found, _pair(fixed)
            )
            transform.options = _resizing(processor, _pair(fixed))
    return ImageProcessor(transform, "pixel_values")


@dataclass
class _Transform:
    """A transformers image processor of one image; a class, since workers get it pickled."""

    processor: Any
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, image: Image) -> Tensor:
        return self.processor(images=image, return_tensors="pt", **self.options)["pixel_values"][0]

    def follow(self, ids: np.ndarray, void: int) -> Tensor:
        """A label map through the same geometry, as the colour of an image that is not normalised."""
        from PIL import Image

        grey = Image.fromarray(np.where(ids == void, 255, ids).astype(np.uint8)).convert("RGB")
        plain = {"do_rescale": False, "do_normalize": False, "resample": Image.Resampling.NEAREST}
        found = self.processor(images=grey, return_tensors="pt", **{**self.options, **plain})
        mask = found["pixel_values"][0][0].long()  # (height, width) of the first channel
        return mask.masked_fill(mask == 255, void)


def settle_image_size(folder: Path, config: Any, trust_remote_code: bool = False) -> None:
    """Give a config without an image size (models that take any) the one that its processor makes.

    A processor that gives images different sizes is made to give squares of its shortest edge: a batch, and what a
    model costs, needs one size.
    """
    from transformers import AutoImageProcessor

    fixed = getattr(getattr(config, "vision_config", config), "image_size", None)
    if fixed is not None or not (folder / "preprocessor_config.json").is_file():
        return
    check_part(folder, "image processor", trust_remote_code)
    processor = AutoImageProcessor.from_pretrained(folder, config=config, trust_remote_code=trust_remote_code)
    wide, high = (tuple(_Transform(processor)(_wide(size)).shape[-2:]) for size in ((64, 96), (96, 64)))
    if wide != high:
        edge = dict(processor.size).get("shortest_edge") or min(wide)
        log.info("%s gives images different sizes: taking %d x %d for all", folder, edge, edge)
        wide = (edge, edge)
    config.image_size = list(wide)


def _wide(size: tuple[int, int]) -> Image:
    """An image larger than `size` and of another shape: it shows whether a processor gives images different sizes."""
    from PIL import Image

    return Image.new("RGB", (3 * size[1] + 1, 2 * size[0] + 1))


def _resizing(processor: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Options that make a processor give images of `size`, cropping as large a part as it did."""
    target = {"height": size[0], "width": size[1]}
    if not getattr(processor, "do_center_crop", False):
        return {"do_resize": True, "size": target}
    resized, crop = dict(processor.size), dict(processor.crop_size)
    edge = resized.get("shortest_edge") or resized.get("height") or min(size)
    share = max(1.0, edge / crop["height"])
    if "shortest_edge" in resized:
        before: dict[str, int] = {"shortest_edge": round(share * max(size))}
    else:
        before = {name: round(share * length) for name, length in target.items()}
    return {"do_resize": True, "size": before, "crop_size": target}


def timm_image_processor(model: torch.nn.Module) -> ImageProcessor:
    """The evaluation transform of a timm model's own data config."""
    from timm.data import create_transform, resolve_model_data_config

    return ImageProcessor(create_transform(**resolve_model_data_config(model), is_training=False), "x")


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
