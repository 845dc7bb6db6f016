"""What is read from a model's own files: how long a text may be, and what happens to an image."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.families import IMAGE_FAMILIES, MAX_LENGTH, TEXT_FAMILIES
from helpers.models import shared_model, tiny_model
from PIL import Image

from optin_cli.loading.checkpoint import OpenModel, open_model


def without_tokenizer_limit(folder: Path) -> Path:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["model_max_length"]
    path.write_text(json.dumps(settings))
    return folder


def opened(folder: Path) -> OpenModel:
    return open_model(str(folder), device="cpu")


@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_a_text_is_cut_to_the_positions_that_the_model_has(name, tmp_path):
    """RoBERTa and MPNet have two positions that no token uses."""
    model = opened(without_tokenizer_limit(tiny_model(name, tmp_path)))
    assert model.processor.max_length == MAX_LENGTH
    inputs = model.processor.pad(model.processor.tokenize(["cat " * 200]))
    assert inputs["input_ids"].shape == (1, MAX_LENGTH)
    with torch.no_grad():
        assert model.output(inputs).isfinite().all()


def test_the_limit_of_the_tokenizer_holds_where_it_is_lower(tmp_path):
    folder = tiny_model("bert", tmp_path, max_position_embeddings=100)
    assert opened(folder).processor.max_length == MAX_LENGTH


def test_the_limit_of_sentence_transformers_holds_where_it_is_lower(tmp_path):
    folder = tiny_model("bert", tmp_path, "encoder")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 20}')
    assert opened(folder).processor.max_length == 20


def test_a_sentence_transformers_file_without_a_limit_changes_nothing(tmp_path):
    folder = tiny_model("bert", tmp_path, "encoder")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": null}')
    assert opened(folder).processor.max_length == MAX_LENGTH


def test_texts_are_padded_to_the_longest_of_their_batch():
    processor = shared_model("bert").processor
    rows = processor.tokenize(["cat", "the old dog"])
    assert [len(row["input_ids"]) for row in rows] == [3, 5]
    batch = processor.pad(rows)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize("name", IMAGE_FAMILIES)
def test_images_of_any_size_and_mode_fit_the_model(name):
    model = shared_model(name)
    for mode, size in (("RGB", (50, 40)), ("L", (20, 70)), ("RGBA", (32, 32))):
        pixels = model.processor(Image.new(mode, size))
        with torch.no_grad():
            assert model.output({model.processor.input_name: pixels[None]}).shape == (1, 1, 5)


@pytest.mark.parametrize("name", ["vit", "deit"])
@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"height": 48, "width": 40}},
        {"size": {"shortest_edge": 32}},
        {"do_resize": False},
        {"size": {"shortest_edge": 60}, "do_center_crop": True, "crop_size": {"height": 48, "width": 48}},
        {
            "size": {"height": 60, "width": 60},
            "do_center_crop": True,
            "crop_size": {"height": 48, "width": 48},
        },
    ],
    ids=["larger", "shortest edge", "as it is", "cropped", "squared and cropped"],
)
def test_a_processor_set_up_for_another_size_gives_the_one_that_the_model_takes(name, settings, tmp_path):
    folder = tiny_model(name, tmp_path)
    path = folder / "preprocessor_config.json"
    if not path.exists():
        path = folder / "processor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    model = opened(folder)
    for size in ((50, 40), (20, 70), (32, 32)):
        pixels = model.processor(Image.new("RGB", size))
        with torch.no_grad():
            assert model.output({"pixel_values": pixels[None]}).shape == (1, 1, 5)


def test_a_crop_keeps_its_share_at_another_size(tmp_path):
    """Of 64 x 64, a crop of 48 out of 60 shows the middle 51: a frame of 4 pixels stays out of sight."""
    folder = tiny_model("deit", tmp_path)
    path = folder / "preprocessor_config.json"
    crop = {"size": {"shortest_edge": 60}, "do_center_crop": True, "crop_size": {"height": 48, "width": 48}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **crop}))
    framed = Image.new("RGB", (64, 64), (255, 255, 255))
    framed.paste((0, 0, 0), (4, 4, 60, 60))
    processor = opened(folder).processor
    torch.testing.assert_close(processor(framed), -torch.ones(3, 32, 32))
    framed.paste((255, 255, 255), (0, 0, 9, 64))
    assert processor(framed)[:, :, 0].max() > 0


def test_a_processor_of_the_right_size_is_left_as_it_is():
    model = shared_model("vit")
    image = Image.effect_noise((50, 40), 60).convert("RGB")
    from transformers import AutoImageProcessor

    plain = AutoImageProcessor.from_pretrained(model.source.folder)(images=image, return_tensors="pt")
    assert torch.equal(model.processor(image), plain["pixel_values"][0])


@pytest.mark.parametrize("name", ["vit", "deit", "clip-image-classifier"])
def test_an_image_model_without_a_processor_file_gets_a_plain_one_of_its_size(name, tmp_path):
    folder = tiny_model(name, tmp_path)
    (folder / "preprocessor_config.json").unlink()
    pixels = opened(folder).processor(Image.new("RGB", (50, 40), (255, 255, 255)))
    torch.testing.assert_close(pixels, torch.ones(3, 32, 32))
