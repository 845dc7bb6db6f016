"""Models, data and outputs, one example at a time, for the tests of evaluation."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from helpers.data import sentences
from helpers.families import IMAGE_SIZE
from helpers.models import new_folder, shared_model, tiny_model
from optin_cli.data.batches import Batches
from optin_cli.data.examples import sample
from optin_cli.data.readers import ROWS, Reader
from optin_cli.data.sources import DataSpec
from optin_cli.loading.checkpoint import OpenModel, open_model
from optin_cli.loading.processors import ImageProcessor

CLOSE = 1e-3  # points


@cache
def other_model(name: str = "bert", head: str = "classifier") -> OpenModel:
    """Differs from `shared_model` a little: noise on every weight."""
    model = shared_model(name, head)
    module = copy.deepcopy(model.module)
    generator = torch.Generator().manual_seed(7)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return dataclasses.replace(model, module=module)


@cache
def special_model(head: str = "classifier", name: str = "bert", **config: Any) -> OpenModel:
    return open_model(str(tiny_model(name, new_folder() / "m", head, **config)), device="cpu")


def batches(model: OpenModel, path: Path, batch_size: int = 8, reader: Reader = ROWS, **spec: Any) -> Batches:
    examples = sample(DataSpec(str(path), **spec), model.family.modality, None, 0, reader=reader)
    processor = model.processor
    if model.source.library == "timm":
        from timm.data import create_transform

        processor = ImageProcessor(create_transform(input_size=IMAGE_SIZE), "x")
    return Batches(examples, processor, batch_size, reader=reader)


def labelled(folder: Path, labels: list[Any], text: list[str] | None = None) -> Path:
    """A CSV file with `sentence` and the given labels."""
    text = text or sentences(len(labels))
    path = folder / "train.csv"
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([("sentence", "label"), *zip(text, labels, strict=True)])
    return path


def json_lines(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tagged(folder: Path, rows: int = 12, classes: int = 2, **overrides: Any) -> Path:
    """Words (some of several pieces) with a tag for each."""
    rng = np.random.default_rng(3)
    texts = [[w + ("ly" if rng.random() < 0.4 else "") for w in s.split()] for s in sentences(rows, 5)]
    data = [{"tokens": words, "tags": rng.integers(0, classes, len(words)).tolist()} for words in texts]
    return json_lines(folder, [{**row, **overrides} for row in data])


@torch.no_grad()
def one_by_one(model: OpenModel, texts: list[str], pairs: list[str] | None = None) -> torch.Tensor:
    """Raw logits of each text, without batching, padding or `Task`."""
    rows = []
    for i, text in enumerate(texts):
        encoded = model.processor.tokenizer(text, pairs[i] if pairs else None, return_tensors="pt")
        rows.append(model.module(**encoded).logits[0])
    return torch.stack(rows)


@torch.no_grad()
def embed_one_by_one(model: OpenModel, texts: list[str]) -> torch.Tensor:
    encoded = [model.processor.tokenizer(text, return_tensors="pt") for text in texts]
    return torch.stack([model.module(**e).last_hidden_state[0].mean(dim=0) for e in encoded])


def columns(path: Path, *names: str) -> list[list[str]]:
    with path.open() as stream:
        rows = list(csv.DictReader(stream))
    return [[row[name] for row in rows] for name in names]
