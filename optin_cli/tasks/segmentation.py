"""A class for each pixel."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from optin_cli.data.batches import Batch, Batches
from optin_cli.data.label_maps import VOID, Masks
from optin_cli.data.readers import MASKS
from optin_cli.errors import InputError, param
from optin_cli.tasks import metrics
from optin_cli.tasks.base import Forward, Inputs, Task, logits_of, ones

log = logging.getLogger("optin")

SEGMENTATION = "segmentation"


@dataclass(frozen=True)
class Segmentation(Task):
    """A class for each pixel, whatever objects there are: semantic segmentation.

    The output has a row for each position of the map that the model gives, a quarter of the image's sides as a rule,
    row after row. A model that classifies pixels gives their logits. A model that classifies masks (MaskFormer,
    Mask2Former) gives for every query q the probability of each class, p, and of a mask at each position, m; a class
    has the score sum_q p_qc m_q, as in the processors' `post_process_semantic_segmentation`, and the output is the
    log of it. So both are logits of one choice among the classes, and KL and the Fisher metric mean the same. Scores of
    queries would not do: queries may swap their roles and nothing is lost.
    """

    name = SEGMENTATION
    auto_class = "AutoModelForSemanticSegmentation"
    architectures = ("ForSemanticSegmentation", "ForUniversalSegmentation", "ForInstanceSegmentation")
    reader = MASKS
    main = ("miou",)
    reads_stages = True
    label_option = param("mask")

    def output(self, model: Forward, inputs: Inputs) -> Tensor:
        result = model(**inputs)
        if getattr(result, "class_queries_logits", None) is not None:
            scores = query_scores(result.class_queries_logits.float(), result.masks_queries_logits.float())
        else:
            scores = logits_of(result).float()
        return scores.flatten(2).mT  # (batch, positions, classes)

    def row_weights(self, inputs: Inputs) -> Tensor:
        return ones(inputs, 1)  # (batch, 1): every position counts the same

    def labels(self, batches: Batches) -> Masks | None:
        """The masks of all rows, decoded one at a time."""
        if batches.examples.columns.mask is None:
            return None
        return Masks(batches.examples, self.classes, getattr(batches.processor, "reduces_labels", False))

    def targets(self, batches: Batches) -> list[Tensor] | None:
        """The masks as the model's processor resizes and crops its images, nearest: (height, width) each."""
        masks = self.labels(batches)
        if masks is None:
            return None
        found = [batches.processor.follow(mask, VOID) for mask in masks]
        if len({int(c) for mask in found for c in mask.unique() if c != VOID}) < 2:
            raise InputError(
                f"the sampled masks of {batches.examples.where} have one class or none: the loss says nothing",
                f"sample more rows ({param('samples')}), or another split",
            )
        return found

    def loss(self, output: Tensor, labels: Sequence[Any]) -> Tensor:
        """The mean cross-entropy over the positions that are not void."""
        height, width = map_size(output.shape[1], labels[0].shape[-2:])
        wanted = torch.stack(list(labels)).to(output.device)[:, None].float()
        wanted = F.interpolate(wanted, (height, width), mode="nearest-exact").flatten(1).long()
        losses = F.cross_entropy(output.mT, wanted, ignore_index=VOID, reduction="none")
        return losses.sum(1) / (wanted != VOID).sum(1).clamp(min=1)

    def keep(self, batch: Batch, output: Tensor, weights: Tensor, labels: Any) -> list[Any]:
        """Of each example, its pairs of true and seen classes (true * classes + seen) and how often they occur."""
        if labels is None:
            return [None] * len(batch)
        size = map_size(output.shape[1], next(iter(batch.inputs.values())).shape[-2:])
        found = []
        for example, scores in zip(batch.example_ids, output, strict=True):
            true = torch.from_numpy(labels[example])
            seen = upsampled(scores, size, (true.shape[0], true.shape[1])).cpu()
            known = true != VOID
            pairs = true[known].long() * self.classes + seen[known]
            codes, counts = pairs.unique(return_counts=True)
            found.append((codes.numpy(), counts.numpy()))
        return found

    def metrics(self, kept: Sequence[Any], labels: Any, batches: Batches) -> dict[str, float]:
        """`miou` of the classes that occur, and `pixel_accuracy`."""
        codes, counts = (np.concatenate([item[side] for item in kept]) for side in (0, 1))
        where = batches.examples.where
        if not len(codes):
            raise InputError(f"every pixel of {where} counts nothing", f"check {param('ignore_index')}")
        true, seen = np.divmod(codes, max(1, self.classes))
        absent = sorted(set(range(self.classes)) - set(true.tolist()))
        if absent:
            names = {number: name for name, number in self.label2id.items()}
            missing = ", ".join(names.get(number, str(number)) for number in absent[:10])
            log.warning(
                "%d of %d classes never occur in %s, miou is the mean of the others: %s%s",
                len(absent), self.classes, where, missing, " .." if len(absent) > 10 else "",
            )  # fmt: skip
        return metrics.segmentation(true, seen, counts)


def query_scores(classes: Tensor, masks: Tensor) -> Tensor:
    """log sum_q softmax(classes)_qc sigmoid(masks)_q, but for a constant at each position: (batch, classes, h, w).

    `classes` is (batch, queries, classes + 1), the last being no object, `masks` (batch, queries, h, w). The largest
    mask at each position is taken out of the sum first, so that no logits make it zero: the log stays finite and
    has a gradient.
    """
    share = classes.softmax(-1)[..., :-1]
    logs = F.logsigmoid(masks)
    most = logs.detach().amax(1, keepdim=True)
    total = torch.einsum("bqc,bqhw->bchw", share, (logs - most).exp())
    return total.clamp(min=torch.finfo(total.dtype).tiny).log()


def map_size(positions: int, image: Sequence[int]) -> tuple[int, int]:
    """(height, width) of a map of so many positions whose sides are as those of an image (height, width)."""
    height, width = image[-2:]
    sides = [h for h in range(1, positions + 1) if positions % h == 0]
    best = min(sides, key=lambda h: abs(math.log(h * h / positions * width / height)))
    return best, positions // best


def upsampled(scores: Tensor, size: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """The class of each pixel of an image of `target` (height, width), from scores (positions, classes) of a map of
    `size`, interpolated."""
    grid = scores.mT.reshape(1, -1, *size)
    return F.interpolate(grid, target, mode="bilinear", align_corners=False)[0].argmax(0)
