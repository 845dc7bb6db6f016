"""Outputs and metrics of segmentation, against transformers' own post-processing and counts by hand."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.data import tiny_masks
from helpers.lazy import Lazy
from helpers.models import shared_model
from PIL import Image
from torch.nn import functional as F

from optin_cli.data.batches import Batches
from optin_cli.data.examples import sample
from optin_cli.data.label_maps import VOID, Masks
from optin_cli.data.readers import MASKS
from optin_cli.data.sources import DataSpec
from optin_cli.errors import InputError, UsageError
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.measure.evaluate import evaluate
from optin_cli.scoring.labels import read_labels
from optin_cli.tasks.segmentation import Segmentation, map_size, query_scores, upsampled

transformers = Lazy("transformers")

oracle = Lazy("sklearn.metrics")

CLASSES = 5


def batches(model: OpenModel, folder, **spec) -> Batches:
    examples = sample(DataSpec(str(folder), **spec), "image", None, 0, reader=MASKS)
    return Batches(examples, model.processor, 4, reader=MASKS)


def queries(seed: int = 0, scale: float = 3.0) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(seed)
    return SimpleNamespace(
        class_queries_logits=scale * torch.randn(2, 7, CLASSES + 1, generator=generator),
        masks_queries_logits=scale * torch.randn(2, 7, 12, 16, generator=generator),
    )


def test_scores_of_queries_are_those_of_the_processor():
    result = queries()
    found = Segmentation(classes=CLASSES).output(lambda: result, {})
    assert found.shape == (2, 12 * 16, CLASSES)
    expected = torch.einsum(
        "bqc,bqhw->bchw",
        result.class_queries_logits.softmax(-1)[..., :-1],
        result.masks_queries_logits.sigmoid(),
    )
    expected = expected / expected.sum(1, keepdim=True)
    torch.testing.assert_close(found.softmax(-1), expected.flatten(2).mT)


def test_scores_of_queries_stay_finite_and_have_gradients():
    result = queries()
    masks = (result.masks_queries_logits - 300).double().requires_grad_()
    scores = query_scores(result.class_queries_logits.double(), masks)
    assert scores.isfinite().all()
    scores.log_softmax(1)[:, 2].sum().backward()
    assert masks.grad is not None and masks.grad.isfinite().all() and (masks.grad != 0).any()
    float32 = query_scores(result.class_queries_logits, masks.detach().float())
    torch.testing.assert_close(float32.softmax(1).double(), scores.detach().softmax(1), rtol=1e-4, atol=1e-6)


def smooth(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    coarse = torch.randn(*shape[:-2], 3, 4, generator=torch.Generator().manual_seed(seed))
    return 4 * F.interpolate(coarse, shape[-2:], mode="bicubic")


def test_pixels_get_the_classes_that_the_processors_give_them():
    logits = smooth((2, CLASSES, 12, 16), 0)
    expected = transformers.SegformerImageProcessor().post_process_semantic_segmentation(
        SimpleNamespace(logits=logits), target_sizes=[(45, 70)] * 2
    )
    output = Segmentation(classes=CLASSES).output(lambda: SimpleNamespace(logits=logits), {})
    for scores, seen in zip(output, expected, strict=True):
        assert torch.equal(upsampled(scores, (12, 16), (45, 70)), seen)
    masks = SimpleNamespace(
        class_queries_logits=queries().class_queries_logits, masks_queries_logits=smooth((2, 7, 12, 16), 1)
    )
    expected = transformers.Mask2FormerImageProcessor().post_process_semantic_segmentation(
        masks, [(45, 70)] * 2
    )
    output = Segmentation(classes=CLASSES).output(lambda: masks, {})
    for scores, seen in zip(
        output, expected, strict=True
    ):  # the processor interpolates masks, we their scores
        assert (upsampled(scores, (12, 16), (45, 70)) == seen).float().mean() > 0.97


@pytest.mark.parametrize(
    ("image", "size"),
    [((144, 192), (36, 48)), ((32, 32), (16, 16)), ((100, 61), (25, 16)), ((7, 300), (2, 75))],
)
def test_the_size_of_a_map_follows_from_the_image(image, size):
    assert map_size(size[0] * size[1], image) == size


def test_metrics_are_those_of_the_confusion_matrix_of_all_pixels(tmp_path):
    model = shared_model("segformer")
    found = batches(model, tiny_masks(tmp_path))
    told = evaluate(model, found, model)
    total = np.zeros((CLASSES, CLASSES))
    masks = Masks(found.examples, CLASSES)
    with torch.inference_mode():
        for batch in found:
            logits = model.module(**batch.inputs).logits
            logits = F.interpolate(logits, masks[0].shape, mode="bilinear", align_corners=False)
            for example, seen in zip(batch.example_ids, logits.argmax(1).numpy(), strict=True):
                known = masks[example] != VOID
                total += oracle.confusion_matrix(masks[example][known], seen[known], labels=range(CLASSES))
    right = total.diagonal()
    iou = right / (total.sum(0) + total.sum(1) - right)
    assert told.main == "miou"
    assert told.metrics["miou"] == pytest.approx(100 * iou.mean())
    assert told.metrics["pixel_accuracy"] == pytest.approx(100 * right.sum() / total.sum())
    assert told.fidelity["agreement"] == pytest.approx(100)
    assert told.fidelity["kl"] == pytest.approx(0, abs=1e-9)
    assert told.drop == 0


def test_a_class_that_never_occurs_is_said_and_left_out(tmp_path, caplog):
    model = shared_model("segformer")
    folder = tiny_masks(tmp_path, classes=3)
    with caplog.at_level(logging.WARNING, "optin"):
        told = evaluate(model, batches(model, folder))
    assert "2 of 5 classes never occur" in caplog.text
    found = batches(model, folder)
    pairs = [
        pair
        for batch in found
        for pair in model.task.keep(batch, model.output(batch.inputs), None, model.task.labels(found))
    ]
    total = np.zeros(CLASSES * CLASSES)
    for codes, counts in pairs:
        np.add.at(total, codes, counts)
    total = total.reshape(CLASSES, CLASSES)
    right = total.diagonal()
    iou = (right / (total.sum(0) + total.sum(1) - right).clip(1))[:3]
    assert told.metrics["miou"] == pytest.approx(100 * iou.mean())


def test_nothing_but_void_and_no_masks_are_refused(tmp_path):
    model = shared_model("segformer")
    with pytest.raises(InputError, match="counts nothing"):
        evaluate(model, batches(model, tiny_masks(tmp_path / "a", classes=1, void=0), ignore_index=0))
    images = batches(model, tiny_masks(tmp_path / "b") / "images")
    with pytest.raises(UsageError, match="no labels for segmentation") as caught:
        evaluate(model, images)
    assert "with mask" in str(caught.value)
    with pytest.raises(UsageError, match="method='fisher' needs labels"):
        read_labels(model, images, "fisher")
    assert evaluate(model, images, model).fidelity["agreement"] == pytest.approx(100)


# ---- the labelled loss ----


def test_masks_follow_their_images_through_the_processor():
    model = shared_model("segformer")
    ids = np.repeat(np.repeat(np.arange(4).reshape(2, 2), 32, 0), 48, 1)
    ids[:5] = VOID
    found = model.processor.follow(ids, VOID)
    pixels = model.processor(Image.fromarray(np.uint8(ids * 40)))
    assert found.shape == pixels.shape[1:]
    assert set(found.unique().tolist()) == {VOID, 0, 1, 2, 3}
    assert (found[20, 4], found[4, 20], found[20, 20]) == (2, 1, 3)


def test_the_loss_is_the_mean_cross_entropy_of_positions_that_count(tmp_path):
    model = shared_model("segformer")
    found = batches(model, tiny_masks(tmp_path))
    targets = read_labels(model, found, "fisher")
    batch = found[0]
    with torch.no_grad():
        logits = model.module(**batch.inputs).logits
    wanted = torch.stack([targets[i] for i in batch.example_ids])[:, None].float()
    wanted = F.interpolate(wanted, logits.shape[-2:], mode="nearest-exact")[:, 0].long()
    expected = [
        F.cross_entropy(x[None], y[None], ignore_index=VOID) for x, y in zip(logits, wanted, strict=True)
    ]
    losses = model.task.loss(model.output(batch.inputs), [targets[i] for i in batch.example_ids])
    torch.testing.assert_close(losses, torch.stack(expected))
