"""Whisper: generation with both caches, and costs at the sizes that its two streams have."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.families import BLOCKS
from helpers.models import copy_of, opened, saved_model, shared_model, tiny_model
from helpers.runs import random_inputs
from torch import nn

from optin_cli.errors import InputError
from optin_cli.transforms.masking import masked, masks_from_keep
from optin_cli.transforms.slicing import slice_model

CASES = {
    "uneven": (),
    "first self-attention of the decoder empty": ("blocks.3.heads",),
    "first cross-attention empty": ("blocks.3.cross",),
    "no head in the middle": ("blocks.1.heads", "blocks.4"),
}


def generated(module: nn.Module, inputs: dict[str, torch.Tensor], **options) -> torch.Tensor:
    found = module.generate(
        input_features=inputs["input_features"], max_new_tokens=7, min_new_tokens=7, do_sample=False,
        output_logits=True, return_dict_in_generate=True, **options,
    )  # fmt: skip
    return torch.stack(found.logits)


@pytest.mark.parametrize("case", CASES)
def test_a_sliced_model_generates_what_the_masked_one_does(case):
    model = opened(saved_model("whisper"))
    keep = {
        site.name: []
        if site.name.startswith(CASES[case] or "none")
        else [u for u in range(site.units) if (u + i) % 3]
        for i, site in enumerate(model.anatomy)
    }
    inputs = random_inputs(model, batch=2)
    with masked(model.module, model.anatomy, masks_from_keep(model.anatomy, keep)):
        expected = generated(model.module, inputs, use_cache=False)
    smaller = copy.deepcopy(model.module)
    slice_model(smaller, model.anatomy, keep)
    for options in ({"use_cache": False}, {}, {"cache_implementation": "static"}):
        torch.testing.assert_close(generated(smaller, inputs, **options), expected, rtol=0, atol=1e-4)


def test_a_head_costs_what_its_own_stream_sees():
    """50 positions of the encoder, 16 tokens of the transcript; cross-attention has its keys and values from the
    one, its queries from the other."""
    model, d, width = shared_model("whisper"), 32, 8
    costs = {site.name: site.macs_per_unit(50) for site in model.anatomy}
    assert costs["blocks.0.heads"] == pytest.approx(4 * 50 * d * width + 2 * 50 * 50 * width)
    assert costs[f"blocks.{BLOCKS}.heads"] == pytest.approx(4 * 16 * d * width + 2 * 16 * 16 * width)
    cross = 2 * 16 * d * width + 2 * 50 * d * width + 2 * 16 * 50 * width
    assert costs[f"blocks.{BLOCKS}.cross"] == pytest.approx(cross)
    assert costs["blocks.0.neurons"] == pytest.approx(2 * 50 * d)
    assert costs[f"blocks.{BLOCKS}.neurons"] == pytest.approx(2 * 16 * d)


def test_transcripts_are_read_from_behind_the_start():
    text = opened(saved_model("whisper")).processor.text
    start = text.start
    read, wanted = text.decoded(["the cat sits"], None)
    assert start == text.tokenizer.cls_token_id  # this tokenizer begins with it, as Whisper's does
    assert wanted[0] == text.tokenizer("the cat sits")["input_ids"][1:]
    assert read[0]["decoder_input_ids"] == [start, *wanted[0][:-1]]
    longest, _ = text.decoded(["the cat sits on the tree " * 9], None)
    assert len(longest[0]["decoder_input_ids"]) <= 16


def test_spectrograms_of_another_size_are_told(tmp_path):
    from transformers import WhisperFeatureExtractor

    folder = copy_of(saved_model("whisper-classifier"), tmp_path / "m")
    WhisperFeatureExtractor(feature_size=8, chunk_length=2).save_pretrained(folder)
    with pytest.raises(InputError, match="8 x 200, and the model takes 8 x 100"):
        _ = opened(folder).processor
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match="no usable feature extractor"):
        _ = opened(folder).processor


def test_a_head_on_all_blocks_makes_them_no_chain(tmp_path):
    folder = tiny_model("whisper-classifier", tmp_path / "m", use_weighted_layer_sum=True)
    assert not opened(folder).anatomy.chained
    assert shared_model("whisper-classifier").anatomy.chained
