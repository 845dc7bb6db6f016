"""What is special about segmentation models: sizes of their images, deformable heads, which sites there are."""

from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from helpers.data import tiny_masks
from helpers.lazy import Lazy
from helpers.models import copy_of, opened, randomise, saved_model, shared_model
from helpers.runs import outputs, random_inputs
from PIL import Image

from optin_cli.architectures.families import family_from_dict, family_to_dict
from optin_cli.architectures.positions import image_size
from optin_cli.architectures.resolve import dissect
from optin_cli.data.batches import Batches
from optin_cli.data.examples import sample
from optin_cli.data.sources import DataSpec
from optin_cli.errors import InputError
from optin_cli.scoring.calibration import Calibration
from optin_cli.scoring.losses import output_change
from optin_cli.scoring.methods.ablation import Ablation
from optin_cli.transforms.masking import masked, masks_from_keep
from optin_cli.transforms.slicing import slice_model

transformers = Lazy("transformers")


def kinds(name: str) -> dict[int, list[str]]:
    """Labels of the sites of each block that has any."""
    model = shared_model(name)
    return {s.block: [site.label for site in model.anatomy.in_block(s.block)] for s in model.anatomy}


def test_each_part_of_a_model_has_the_sites_that_can_be_sliced():
    swin = {block: ["heads", "neurons"] for block in (0, 1, 3, 5, 7)}
    assert kinds("mask2former-swin") == {
        **swin,
        **{key: ["heads", "neurons"] for key in (8, 9)},
        **{key: ["neurons"] for key in (10, 11)},
    }
    decoder = {key: ["heads", "cross_heads", "neurons"] for key in (8, 9)}
    assert kinds("maskformer-swin") == {**swin, **decoder}
    assert kinds("mask2former-resnet")[0] == ["channels1", "channels2"]
    assert kinds("maskformer-resnet")[0] == ["channels"]


def test_each_stream_has_its_layout():
    anatomy = shared_model("mask2former-resnet").anatomy
    assert [(s.first, s.layout) for s in anatomy.streams] == [(0, "nchw"), (5, "tokens"), (7, "sequence")]
    assert not shared_model("segformer").anatomy.chained


@pytest.mark.parametrize("head", [0, 3, *(pytest.param(one, marks=pytest.mark.slow) for one in (1, 2))])
def test_a_deformable_head_keeps_its_own_sampling_points(head):
    """Sliced twice to one head, by way of two."""
    model = shared_model("mask2former-swin")
    name = next(s.name for s in model.anatomy if s.consumer.endswith("self_attn.output_proj"))
    pair = sorted({head, (head + 2) % 4})
    module = copy.deepcopy(model.module)
    slice_model(module, model.anatomy, {name: pair})
    slice_model(module, dissect(module, model.family), {name: [pair.index(head)]})
    with masked(model.module, model.anatomy, masks_from_keep(model.anatomy, {name: [head]})):
        expected = outputs(model, model.module, random_inputs(model))
    torch.testing.assert_close(outputs(model, module, random_inputs(model)), expected, rtol=0, atol=1e-9)


def test_a_producer_of_another_width_is_refused():
    model = shared_model("mask2former-swin")
    sites = [
        dataclasses.replace(
            table,
            producers=tuple(
                dataclasses.replace(p, width=13 if p.width == 12 else p.width) for p in table.producers
            ),
        )
        for table in model.family.sites
    ]
    wrong = dataclasses.replace(model.family, sites=tuple(sites))
    with pytest.raises(InputError, match="attention_weights gives 48 features, but 1 x 4 units x 13"):
        dissect(model.module, wrong)


@pytest.mark.parametrize("name", ["segformer", "mask2former-swin", "maskformer-resnet"])
def test_tables_survive_as_data(name):
    family = shared_model(name).family
    assert family_from_dict(json.loads(json.dumps(family_to_dict(family)))) == family


# ---- one size for all images ----


def with_processor(processor, folder):
    copy_of(saved_model("segformer"), folder)
    processor.save_pretrained(folder)
    return opened(folder)


def test_the_processor_says_how_large_the_images_are(tmp_path):
    model = with_processor(transformers.SegformerImageProcessor(size={"height": 48, "width": 64}), tmp_path)
    assert image_size(model.module) == (48, 64)
    assert model.processor(Image.new("RGB", (30, 90))).shape == (3, 48, 64)
    # the first block sees 24 x 32 positions, so that much more than at 32 x 32 is attended to
    heads, larger = shared_model("segformer").anatomy["blocks.0.heads"], model.anatomy["blocks.0.heads"]
    attended = {16 * 16: 4 * 4, 24 * 32: 6 * 8}
    assert larger.macs_per_token - heads.macs_per_token == 2 * heads.width * (attended[768] - attended[256])


def test_a_processor_of_sizes_of_their_own_makes_squares(tmp_path):
    processor = transformers.Mask2FormerImageProcessor(
        size={"shortest_edge": 64, "longest_edge": 200}, size_divisor=32
    )
    model = with_processor(processor, tmp_path)
    assert image_size(model.module) == (64, 64)
    for size in ((90, 30), (30, 90), (64, 64)):
        assert model.processor(Image.new("RGB", size)).shape == (3, 64, 64)
    ids = np.repeat(np.arange(4), 16)[:, None] + np.zeros((1, 32), dtype=int)
    assert model.processor.follow(ids, -1).unique().tolist() == [0, 1, 2, 3]


# ---- heads that read the stages of another family's encoder ----


def test_a_head_that_reads_stages_makes_no_chain(tmp_path):
    """BEiT is a chain of blocks, but for a head that reads them one by one. Oracle: a full forward pass."""
    config = transformers.BeitConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48, image_size=32,
        patch_size=8, out_indices=[1, 2, 3, 4], num_labels=5, use_relative_position_bias=True, pool_scales=[1, 2],
        use_auxiliary_head=False,
    )  # fmt: skip
    randomise(transformers.BeitForSemanticSegmentation(config)).save_pretrained(tmp_path / "model")
    transformers.SegformerImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    model = opened(tmp_path / "model")
    assert (model.task.name, model.anatomy.chained) == ("segmentation", False)
    examples = sample(
        DataSpec(str(tiny_masks(tmp_path / "data", 3))), "image", None, 0, reader=model.task.reader
    )
    batches = Batches(examples, model.processor, 3, reader=model.task.reader)
    calibration = Calibration(model, batches, 24, 4.0, seed=0)
    site = model.anatomy["blocks.2.neurons"]
    _, output = Ablation(calibration, 0).score(site, np.arange(3))
    inputs = batches[0].inputs
    with torch.inference_mode():
        dense = model.output(inputs)
        for unit in range(3):
            mask = torch.ones(site.units)
            mask[unit] = 0
            with masked(model.module, model.anatomy, {site.name: mask}):
                change = output_change(
                    dense,
                    model.output(inputs)[None],
                    torch.ones(dense.shape[:2]),
                    temperature=4.0,
                    term=model.task.term,
                )
            assert output[unit] == pytest.approx(float(change) / dense[..., 0].numel(), rel=1e-3)
