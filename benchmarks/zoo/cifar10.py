"""What the zoo's scripts for CIFAR-10 share: the images, augmentation, the loop, a folder in timm's layout."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from training import Training, parser_of

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CLASSES = 10
SIDE = 32
PADDING = 4
SMOOTHING = 0.1


def transform(side: int = SIDE) -> dict[str, Any]:
    """What a model's config says of its input: images of `side` x `side`, without a crop."""
    return {
        "input_size": (3, side, side),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": MEAN,
        "std": STD,
    }


def pixels(data: Path, split: str, cache: Path) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 32, 32) uint8 and labels (n,) of one split, decoded once and kept in `cache`."""
    images, labels = cache / f"{split}-images.npy", cache / f"{split}-labels.npy"
    if not labels.is_file():
        rows = load_dataset("parquet", data_files=str(data / f"{split}.parquet"), split="train")
        decoded = np.stack([np.asarray(image.convert("RGB")) for image in rows["image"]])
        np.save(images, decoded.transpose(0, 3, 1, 2))
        np.save(labels, np.asarray(rows["label"], dtype=np.int64))
    return torch.from_numpy(np.load(images)), torch.from_numpy(np.load(labels))


def normalised(images: Tensor) -> Tensor:
    """uint8 (n, 3, h, w) -> what the model's own transform gives."""
    mean, std = (torch.tensor(x, device=images.device).view(1, 3, 1, 1) for x in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def resized(images: Tensor, side: int) -> Tensor:
    """Images enlarged as the model's own transform does it."""
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, size=(side, side), mode="bicubic", antialias=True)


def augmented(images: Tensor) -> Tensor:
    """Shift each image by up to `PADDING` pixels over a mirrored border and flip every other one."""
    n, _, height, width = images.shape
    padded = F.pad(images, (PADDING,) * 4, mode="reflect")
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (n, 3, 9, 9, h, w), a view
    dy, dx = torch.randint(0, 2 * PADDING + 1, (2, n), device=images.device)
    shifted = windows[torch.arange(n, device=images.device), :, dy, dx]
    flip = torch.rand(n, device=images.device) < 0.5
    return torch.where(flip.view(n, 1, 1, 1), shifted.flip(3), shifted)


@dataclass
class Recipe:
    """What one script trains, and how."""

    architecture: str
    """Of timm."""
    model_args: dict[str, Any]
    new_model: Callable[[Tensor], nn.Module]
    """Some images (n, 3, 32, 32) uint8 -> the model."""
    new_optimizers: Callable[[nn.Module], list[torch.optim.Optimizer]]
    epochs: int
    side: int = SIDE
    """Of the images that the model sees."""
    before_step: Callable[[nn.Module, float], None] = lambda model, progress: None
    config: dict[str, Any] = field(default_factory=dict)
    """More of `pretrained_cfg`."""


class Classifying(Training):
    """A model that learns by a recipe."""

    def __init__(
        self, recipe: Recipe, settings: argparse.Namespace, images: Tensor, device: torch.device
    ) -> None:
        torch.manual_seed(settings.seed)
        self.recipe = recipe
        model = recipe.new_model(images[:10_000]).to(device)
        super().__init__(model, recipe.new_optimizers(model), settings, len(images))

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One update on uint8 `images` (n, 3, 32, 32); the loss, still on its device."""
        self.recipe.before_step(self.model, self.done / self.total)
        with torch.autocast(images.device.type, torch.bfloat16):
            output = self.model(resized(augmented(normalised(images)), self.recipe.side))
        loss = F.cross_entropy(output.float(), labels, label_smoothing=SMOOTHING)
        return self.descend(loss)

    @torch.no_grad()
    def top1(self, images: Tensor, labels: Tensor, autocast: bool) -> float:
        """Per cent of `images` (n, 3, 32, 32) whose class comes first."""
        self.model.eval()
        right = 0
        for x, y in zip(images.split(250), labels.split(250), strict=True):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
                right += int((self.model(resized(normalised(x), self.recipe.side)).argmax(1) == y).sum())
        self.model.train()
        return 100 * right / len(labels)

    def export(self, folder: Path, card: dict[str, Any]) -> None:
        """config.json in timm's layout, float16 weights, card.json."""
        config = {
            "architecture": self.recipe.architecture,
            "num_classes": CLASSES,
            "num_features": self.model.num_features,
            "model_args": self.recipe.model_args,
            "pretrained_cfg": {"tag": "cifar10", **self.recipe.config, **transform(self.recipe.side)},
        }
        tensors = {key: value.contiguous().cpu() for key, value in self.model.state_dict().items()}
        halved = {key: value.half() if value.is_floating_point() else value for key, value in tensors.items()}
        save_file(halved, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def run(training: Classifying, train: list[Tensor], test: list[Tensor], settings: argparse.Namespace) -> None:
    """Train to the end: a line each hundred steps, a test every second epoch, a checkpoint at intervals."""
    images, labels = train
    saved = clock = time.monotonic()
    losses: list[Tensor] = []
    while training.done < training.total:
        rows = training.next_rows().to(images.device)
        losses.append(training.step(images[rows], labels[rows]))
        if training.done % settings.log_every == 0:
            loss, rate = torch.stack(losses).mean(), len(losses) * len(rows) / (time.monotonic() - clock)
            print(f"step {training.done}/{training.total}: loss {loss:.3f}, {rate:.0f} images/s", flush=True)
            losses, clock = [], time.monotonic()
        epoch, inside = divmod(training.done, training.per_epoch)
        if not inside and (epoch % 2 == 0 or epoch == settings.epochs):
            accuracy = training.top1(*test, autocast=True)
            training.history.append({"epoch": epoch, "of": settings.epochs, "top1": accuracy})
            print(f"epoch {epoch}/{settings.epochs}: top-1 {accuracy:.2f} %", flush=True)
        if time.monotonic() - saved > settings.save_every or training.done == training.total:
            training.save(settings.output / "work" / "state.pt")
            saved = time.monotonic()


def cifar_parser(description: str) -> argparse.ArgumentParser:
    """The options that these scripts have."""
    parser = parser_of(description, epochs=None, batch_size=256)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.parquet and test.parquet")
    parser.add_argument("--log-every", type=int, default=100, help="steps between lines")
    return parser


def train_and_export(recipe: Recipe, settings: argparse.Namespace) -> None:
    """Train by `recipe`, from where an earlier run stopped, and write the model with its card."""
    torch.set_flush_denormal(True)
    settings.epochs = settings.epochs or recipe.epochs
    device = torch.device(settings.device)
    work = settings.output / "work"
    work.mkdir(parents=True, exist_ok=True)
    train, test = ([t.to(device) for t in pixels(settings.data, split, work)] for split in ("train", "test"))
    training = Classifying(recipe, settings, train[0].cpu(), device)
    training.restore(work / "state.pt")
    run(training, train, test, settings)
    training.model.half().float()  # weights as they are stored
    score = training.top1(*test, autocast=False)
    card = {"top1": score, "epochs": settings.epochs, **training.identity, "history": training.history}
    training.export(settings.output, card)
    print(f"{settings.output}: top-1 {score:.2f} % (float16 weights, float32 arithmetic)")
