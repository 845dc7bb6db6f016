"""Train the zoo's VisionTransformer on CIFAR-10 from scratch: about an hour on one CPU core.

    python benchmarks/zoo/vit_cifar10.py --data FOLDER --output FOLDER [--epochs 18]

The result is a directory in timm's own layout, which every optin command opens. The same command goes on
where an interrupted run stopped; --epochs may then move the end of the schedule. README.md is the model card.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from datasets import load_dataset
from safetensors.torch import save_file
from timm.layers import PatchDropout, build_sincos2d_pos_embed, set_fused_attn
from torch import Tensor, nn
from torch.nn import functional as F

ARCHITECTURE = "vit_tiny_patch16_224"  # the name gives width 192; the arguments give the rest
MODEL_ARGS = {
    "img_size": 32,
    "patch_size": 4,
    "depth": 9,
    "num_heads": 6,
    "class_token": False,
    "global_pool": "avg",
}
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
TRANSFORM = {"input_size": (3, 32, 32), "crop_pct": 1.0, "interpolation": "bicubic", "mean": MEAN, "std": STD}
CLASSES = 10
PADDING = 4
WARM_UP = 0.04
SMOOTHING = 0.1


def dropped_patches(progress: float) -> float:
    """The share of patches a step leaves out: half of them cost less than half the time; the end sees all."""
    return 0.5 if progress < 0.78 else 0.25 if progress < 0.89 else 0.0


def learning_rate(progress: float) -> float:
    """One cycle as a share of the peak: a short rise, then a straight line to zero."""
    return min(progress / WARM_UP, (1 - progress) / (1 - WARM_UP))


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


def augmented(images: Tensor) -> Tensor:
    """Shift each image by up to `PADDING` pixels over a mirrored border and flip every other one."""
    n, _, height, width = images.shape
    padded = F.pad(images, (PADDING,) * 4, mode="reflect")
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (n, 3, 9, 9, h, w), a view
    dy, dx = torch.randint(0, 2 * PADDING + 1, (2, n), device=images.device)
    shifted = windows[torch.arange(n, device=images.device), :, dy, dx]
    flip = torch.rand(n, device=images.device) < 0.5
    return torch.where(flip.view(n, 1, 1, 1), shifted.flip(3), shifted)


def new_model(images: Tensor) -> nn.Module:
    """A VisionTransformer whose patch embedding whitens the patches of `images` (n, 3, 32, 32).

    Raw patches differ mostly in brightness, and positions mean nothing until they are learned: whitening
    and a sine grid spare the optimiser both.
    """
    model = timm.create_model(ARCHITECTURE, num_classes=CLASSES, **MODEL_ARGS)
    model.patch_drop = PatchDropout(0.5, num_prefix_tokens=0)
    size, width = model.patch_embed.patch_size[0], model.embed_dim
    patches = F.unfold(normalised(images), size, stride=size).transpose(1, 2).flatten(0, 1)  # (n * 64, 48)
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    spread = torch.linalg.qr(torch.randn(width, len(values)))[0]  # (192, 48), orthonormal columns
    whitening = spread @ torch.diag((values + 1e-2).rsqrt()) @ vectors.T
    with torch.no_grad():
        model.patch_embed.proj.weight.copy_(whitening.view_as(model.patch_embed.proj.weight))
        model.pos_embed.copy_(build_sincos2d_pos_embed(model.patch_embed.grid_size, width, temperature=100))
    return model


def new_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, because it learns much faster per epoch; AdamW for everything else."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    weights = [model.patch_embed.proj.weight, model.head.weight]
    taken = {id(p) for p in (*matrices, *weights)}
    rest = [p for p in model.parameters() if id(p) not in taken]
    groups = [{"params": weights, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.1),
        torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.98), fused=True),
    ]


@torch.no_grad()
def top1(model: nn.Module, images: Tensor, labels: Tensor, autocast: bool) -> float:
    """Per cent of `images` (n, 3, 32, 32) whose class comes first."""
    model.eval()
    right = 0
    for x, y in zip(images.split(250), labels.split(250), strict=True):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            right += int((model(normalised(x)).argmax(1) == y).sum())
    model.train()
    return 100 * right / len(labels)


class Training:
    """Model, optimisers, steps done and history: everything that a resumed run needs."""

    def __init__(self, settings: argparse.Namespace, images: Tensor, device: torch.device) -> None:
        torch.manual_seed(settings.seed)
        self.model = new_model(images[:10_000]).to(device)
        self.optimizers = new_optimizers(self.model)
        self.peaks = [group["lr"] for group in self.groups()]
        self.identity = {key: getattr(settings, key) for key in ("batch_size", "seed")}
        self.total = settings.epochs * (len(images) // settings.batch_size)
        self.done = 0
        self.history: list[dict[str, float]] = []

    def groups(self) -> list[dict[str, Any]]:
        """The optimisers' parameter groups; read anew each time, because loading a state replaces them."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One update on uint8 `images` (n, 3, 32, 32); the loss, still on its device."""
        # a step's randomness is its own, so that resuming is exact
        torch.manual_seed(self.identity["seed"] * 1_000_000 + self.done)
        self.model.patch_drop.prob = dropped_patches(self.done / self.total)
        for group, peak in zip(self.groups(), self.peaks, strict=True):
            group["lr"] = peak * learning_rate((self.done + 1) / self.total)
        with torch.autocast(images.device.type, torch.bfloat16):
            output = self.model(augmented(normalised(images)))
        loss = F.cross_entropy(output.float(), labels, label_smoothing=SMOOTHING)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return loss.detach()

    def save(self, file: Path) -> None:
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        state = {"identity": self.identity, "done": self.done, "history": self.history}
        state |= {"model": self.model.state_dict(), "optimizers": optimizers}
        torch.save(state, partial := file.with_suffix(".partial"))
        partial.replace(file)

    def restore(self, file: Path) -> None:
        """Go on from `file`."""
        state = torch.load(file, map_location="cpu", weights_only=True)
        if state["identity"] != self.identity:
            raise SystemExit(f"{file} was made with {state['identity']}: give those, or another --output")
        self.done, self.history = state["done"], state["history"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def run(training: Training, train: list[Tensor], test: list[Tensor], settings: argparse.Namespace) -> None:
    """Train to the end: a line each hundred steps, a test every second epoch, a checkpoint at intervals."""
    (images, labels), per_epoch = train, training.total // settings.epochs
    saved = clock = time.monotonic()
    losses: list[Tensor] = []
    while training.done < training.total:
        rows = batch_rows(len(images), settings.batch_size, settings.seed, training.done).to(images.device)
        losses.append(training.step(images[rows], labels[rows]))
        if training.done % 100 == 0:
            loss, rate = torch.stack(losses).mean(), len(losses) * len(rows) / (time.monotonic() - clock)
            print(f"step {training.done}/{training.total}: loss {loss:.3f}, {rate:.0f} images/s", flush=True)
            losses, clock = [], time.monotonic()
        epoch, inside = divmod(training.done, per_epoch)
        if not inside and (epoch % 2 == 0 or epoch == settings.epochs):
            accuracy = top1(training.model, *test, autocast=True)
            training.history.append({"epoch": epoch, "of": settings.epochs, "top1": accuracy})
            print(f"epoch {epoch}/{settings.epochs}: top-1 {accuracy:.2f} %", flush=True)
        if time.monotonic() - saved > settings.save_every or training.done == training.total:
            training.save(settings.output / "work" / "state.pt")
            saved = time.monotonic()


def batch_rows(rows: int, batch: int, seed: int, step: int) -> Tensor:
    """Row numbers (batch,) of a step: each epoch has its own permutation and leaves out its last few rows."""
    epoch, index = divmod(step, rows // batch)
    shuffled = torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 10_000 + epoch))
    return shuffled[index * batch : (index + 1) * batch]


def export(model: nn.Module, folder: Path, card: dict[str, Any]) -> None:
    """config.json in timm's layout, float16 weights, card.json."""
    config = {
        "architecture": ARCHITECTURE,
        "num_classes": CLASSES,
        "num_features": model.num_features,
        "model_args": MODEL_ARGS,
        "pretrained_cfg": {"tag": "cifar10", "fixed_input_size": True, **TRANSFORM},
    }
    state = {key: value.half().contiguous().cpu() for key, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train.parquet and test.parquet")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model; work/ in it can go")
    parser.add_argument("--epochs", type=int, default=18, help="a resumed run may name another end")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save-every", type=float, default=240, help="seconds between checkpoints")
    settings = parser.parse_args()
    torch.set_flush_denormal(True)
    device = torch.device(settings.device)
    set_fused_attn(device.type != "cpu")  # on a CPU the fused attention's backward takes half of the time
    work = settings.output / "work"
    work.mkdir(parents=True, exist_ok=True)
    train, test = ([t.to(device) for t in pixels(settings.data, split, work)] for split in ("train", "test"))
    training = Training(settings, train[0].cpu(), device)
    if (state := work / "state.pt").is_file():
        training.restore(state)
    run(training, train, test, settings)
    model = training.model.half().float()
    score = top1(model, *test, autocast=False)  # of the weights as they are stored
    card = {"top1": score, "epochs": settings.epochs, **training.identity, "history": training.history}
    export(model, settings.output, card)
    print(f"{settings.output}: top-1 {score:.2f} % (float16 weights, float32 arithmetic)")


if __name__ == "__main__":
    main()
