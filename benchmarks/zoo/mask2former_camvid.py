"""Train the zoo's Mask2Former on CamVid from scratch: about an hour on one idle CPU core.

    python benchmarks/zoo/mask2former_camvid.py --data FOLDER --output FOLDER [--epochs 80]

The result is a directory in transformers' own layout, which every optin command opens. The same command goes on
where an interrupted run stopped; --epochs may then move the end of the schedule. README.md is the model card.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Image as ImageFeature
from datasets import load_dataset
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from training import Training, parser_of
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    SwinConfig,
)

CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
VOID = 11
SIZE = (144, 192)
"""Height and width that the model sees; CamVid has 360 x 480."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WIDTH = 96
SCALES = (0.5, 1.0)
"""Shares of an image's sides that a training crop has."""
JITTER = 0.3
CLIP = 1.0


def new_model() -> Mask2FormerForUniversalSegmentation:
    """A Mask2Former with a Swin backbone, both much smaller than the published ones. Windows are 6 x 6."""
    backbone = SwinConfig(
        image_size=list(SIZE),
        embed_dim=48,
        depths=[2, 2, 2, 2],
        num_heads=[3, 6, 12, 24],
        window_size=6,
        drop_path_rate=0.1,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=WIDTH,
        mask_feature_size=WIDTH,
        hidden_dim=WIDTH,
        num_attention_heads=6,
        encoder_layers=3,
        encoder_feedforward_dim=4 * WIDTH,
        decoder_layers=5,  # four, and the prediction before the first
        dim_feedforward=4 * WIDTH,
        num_queries=24,
        train_num_points=1024,  # a map of masks has 1,728 points
        id2label=dict(enumerate(CLASSES)),
        label2id={name: number for number, name in enumerate(CLASSES)},
    )
    return Mask2FormerForUniversalSegmentation(config)


def pixels(data: Path, split: str, cache: Path) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 360, 480) uint8 and class ids (n, 360, 480) uint8 of one split, decoded once."""
    images, masks = cache / f"{split}-images.npy", cache / f"{split}-masks.npy"
    if not masks.is_file():
        rows = load_dataset("parquet", data_files=str(data / f"{split}.parquet"), split="train")
        for column in ("image", "mask"):
            rows = rows.cast_column(column, ImageFeature(decode=False))
        opened = [Image.open(io.BytesIO(row["bytes"])).convert("RGB") for row in rows["image"]]
        np.save(images, np.stack([np.asarray(image).transpose(2, 0, 1) for image in opened]))
        ids = [np.asarray(Image.open(io.BytesIO(row["bytes"])), dtype=np.uint8) for row in rows["mask"]]
        np.save(masks, np.stack(ids))
    return torch.from_numpy(np.load(images)), torch.from_numpy(np.load(masks))


def normalised(images: Tensor) -> Tensor:
    """Floats 0..255 (n, 3, h, w) -> what the model's own processor gives."""
    mean, std = (torch.tensor(x, device=images.device).view(1, 3, 1, 1) for x in (MEAN, STD))
    return (images / 255 - mean) / std


def resized(images: Tensor) -> Tensor:
    """Images (n, 3, h, w) at `SIZE`, as floats 0..255."""
    return F.interpolate(images.float(), SIZE, mode="bilinear", antialias=True, align_corners=False)


def augmented(images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """A crop of each image at `SIZE`, every other one flipped, brighter or darker: (n, 3, h, w), (n, h, w)."""
    crops, targets = [], []
    for image, mask in zip(images, masks, strict=True):
        height, width = mask.shape
        share = SCALES[0] + (SCALES[1] - SCALES[0]) * float(torch.rand(()))
        h, w = round(share * height), round(share * width)
        top, left = (int(torch.randint(0, most + 1, ())) for most in (height - h, width - w))
        crop = resized(image[None, :, top : top + h, left : left + w])[0]
        target = F.interpolate(mask[None, None, top : top + h, left : left + w], SIZE, mode="nearest")[0, 0]
        if torch.rand(()) < 0.5:
            crop, target = crop.flip(-1), target.flip(-1)
        gain, shade = (1 + JITTER * (2 * torch.rand(2) - 1)).tolist()
        crops.append((crop * gain + 127 * (shade - 1)).clamp(0, 255))
        targets.append(target)
    return torch.stack(crops), torch.stack(targets)


def binary_masks(masks: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What the model's loss takes: for each image one mask a class it has, (k, h, w), and these classes, (k,)."""
    found, classes = [], []
    for mask in masks:
        present = mask.unique()
        present = present[present != VOID]
        found.append((mask == present[:, None, None]).float())
        classes.append(present.long())
    return found, classes


def confusion(model: Mask2FormerForUniversalSegmentation, images: Tensor, masks: Tensor) -> np.ndarray:
    """Pixels of each class (row) that the model takes for each class (column), at the masks' own size."""
    processor = Mask2FormerImageProcessor()
    total = np.zeros((len(CLASSES), len(CLASSES)), dtype=np.int64)
    with torch.inference_mode():
        for x, y in zip(images.split(8), masks.split(8), strict=True):
            outputs = model(normalised(resized(x)))
            sizes = [tuple(mask.shape) for mask in y]
            for seen, true in zip(
                processor.post_process_semantic_segmentation(outputs, sizes), y, strict=True
            ):
                known = true != VOID
                pairs = true[known].long() * len(CLASSES) + seen[known]
                counts = torch.bincount(pairs, minlength=total.size)
                total += counts.view(total.shape).cpu().numpy()
    return total


def scores(counts: np.ndarray) -> dict[str, float]:
    """Mean intersection over union of the classes that occur, and pixel accuracy, per cent."""
    right, true, seen = counts.diagonal(), counts.sum(1), counts.sum(0)
    there = true > 0
    union = right[there] / (true + seen - right)[there]
    return {"miou": 100 * float(union.mean()), "pixel_accuracy": 100 * float(right.sum() / counts.sum())}


class Segmenting(Training):
    """A Mask2Former that learns by its own loss."""

    def __init__(self, settings: argparse.Namespace, images: int) -> None:
        torch.manual_seed(settings.seed)
        model = new_model().train().to(settings.device)
        decayed = [p for p in model.parameters() if p.dim() > 1]
        rest = [p for p in model.parameters() if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=settings.lr, fused=True)
        super().__init__(model, [optimizer], settings, images, ("batch_size", "seed", "lr"))

    def step(self, images: Tensor, masks: Tensor) -> float:
        """One update on uint8 images (n, 3, h, w) and class ids (n, h, w); returns the loss."""
        crops, targets = augmented(images, masks)
        mask_labels, class_labels = binary_masks(targets)
        with torch.autocast(images.device.type, torch.bfloat16):
            loss = self.model(normalised(crops), mask_labels=mask_labels, class_labels=class_labels).loss
        return self.descend(loss, CLIP).item()


def run(
    training: Segmenting,
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    settings: argparse.Namespace,
) -> None:
    """Train to the end: a line an epoch, the validation score at every tenth one, a checkpoint at intervals."""
    images, masks = train
    saved = clock = time.monotonic()
    losses: list[float] = []
    while training.done < training.total:
        rows = training.next_rows()
        losses.append(training.step(images[rows], masks[rows]))
        epoch, inside = divmod(training.done, training.per_epoch)
        if not inside:
            seconds = time.monotonic() - clock
            mean = sum(losses) / len(losses)
            print(f"epoch {epoch}/{settings.epochs}: loss {mean:.2f}, {seconds:.0f} s", flush=True)
            if epoch % 10 == 0 or epoch == settings.epochs:
                training.model.eval()
                found = scores(confusion(training.model, *val))
                training.model.train()
                training.history.append({"epoch": epoch, "of": settings.epochs, "loss": mean, **found})
                print(f"  val: mIoU {found['miou']:.2f}, pixels {found['pixel_accuracy']:.2f} %", flush=True)
            losses, clock = [], time.monotonic()
        if time.monotonic() - saved > settings.save_every or training.done == training.total:
            training.save(settings.output / "work" / "state.pt")
            saved = time.monotonic()


def export(model: Mask2FormerForUniversalSegmentation, folder: Path, card: dict[str, Any]) -> None:
    """config.json, float16 weights, the image processor, card.json."""
    height, width = SIZE
    processor = Mask2FormerImageProcessor(
        size={"height": height, "width": width},
        size_divisor=1,  # 144 is no multiple of the default, 32
        image_mean=list(MEAN),
        image_std=list(STD),
        ignore_index=255,
        num_labels=len(CLASSES),
        do_pad=False,
    )
    processor.save_pretrained(folder)
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    model.half().save_pretrained(folder)


def main() -> None:
    parser = parser_of(__doc__.splitlines()[0], epochs=80, batch_size=8)
    parser.add_argument("--data", type=Path, required=True, help="folder with train, val and test.parquet")
    parser.add_argument("--lr", type=float, default=6e-4, help="learning rate at its peak")
    settings = parser.parse_args()
    torch.set_flush_denormal(True)
    work = settings.output / "work"
    work.mkdir(parents=True, exist_ok=True)
    splits = [pixels(settings.data, split, work) for split in ("train", "val", "test")]
    train, val, test = ((x.to(settings.device), y.to(settings.device)) for x, y in splits)
    training = Segmenting(settings, len(train[0]))
    training.restore(work / "state.pt")
    run(training, train, val, settings)
    model = training.model.half().float().eval()
    found = {split: scores(confusion(model, *rows)) for split, rows in (("val", val), ("test", test))}
    # of the weights as they are stored
    card = {**found, "epochs": settings.epochs, **training.identity, "history": training.history}
    export(model.cpu(), settings.output, card)
    print(
        f"{settings.output}: mIoU {found['test']['miou']:.2f} on test (float16 weights, float32 arithmetic)"
    )


if __name__ == "__main__":
    main()
