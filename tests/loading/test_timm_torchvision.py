"""timm models by name, from a checkpoint, from a folder in its own layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.families import IMAGE_FAMILIES, TIMM_NAME
from helpers.lazy import Lazy
from helpers.models import copy_of, opened, saved_model, shared_model
from helpers.runs import same_outputs
from safetensors.torch import load_file

from optin_cli.errors import InputError, UsageError
from optin_cli.loading.checkpoint import open_module

timm = Lazy("timm")


def timm_spec(checkpoint: Path, **args) -> str:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4, "mlp_ratio": 2}
    query = "&".join(f"{key}={value}" for key, value in {**sizes, "num_classes": 5, **args}.items())
    return f"timm:{TIMM_NAME}?checkpoint={checkpoint}&{query}"


def test_a_timm_name_with_a_checkpoint_is_the_directory_of_the_same_weights():
    weights = saved_model("timm-vit") / "model.safetensors"
    assert same_outputs(opened(timm_spec(weights)), shared_model("timm-vit"))


@pytest.mark.parametrize("wrap", [None, "model", "state_dict"])
def test_a_timm_checkpoint_may_be_a_pickle_of_tensors(wrap, tmp_path):
    state = load_file(saved_model("timm-vit") / "model.safetensors")
    torch.save(state if wrap is None else {wrap: state}, tmp_path / "w.pth")
    assert same_outputs(opened(timm_spec(tmp_path / "w.pth")), shared_model("timm-vit"))


def test_a_timm_checkpoint_of_another_size_names_a_weight_that_does_not_fit():
    weights = saved_model("timm-vit") / "model.safetensors"
    with pytest.raises(InputError) as caught:
        opened(timm_spec(weights, num_classes=7))
    assert caught.value.exit_code == 1
    assert caught.value.what.endswith(
        "2 of another shape: head.weight (5x48 in the file, 7x48 in the model), "
        "head.bias (5 in the file, 7 in the model)"
    )
    assert "num_classes" in str(caught.value)


@pytest.mark.parametrize("more", [{}, {"num_classes": 7}])
def test_a_checkpoint_that_differs_in_every_way_names_the_first_few_of_each(more, tmp_path):
    """The oracle: torch's own strict loading, which lists all of them."""
    state = load_file(saved_model("timm-vit") / "model.safetensors")
    state["extra.weight"] = torch.zeros(2, 3)
    state["epoch"] = 7
    state["pos_embed"] = state["pos_embed"][:, :9]
    for key in ("norm.bias", "blocks.0.norm1.weight", "blocks.1.norm1.weight", "blocks.2.norm1.weight"):
        del state[key]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(InputError) as caught:
        opened(timm_spec(tmp_path / "w.pth", **more))
    told = caught.value.what
    assert "pos_embed (1x9x48 in the file, 1x17x48 in the model)" in told
    assert ("head.bias (5 in the file, 7 in the model)" in told) == bool(more)
    assert "4 missing: " in told and told.count("(48)") == 3
    assert "2 unexpected: extra.weight (2x3), epoch (no tensor)" in told
    with pytest.raises(RuntimeError) as strict:
        shared_model("timm-vit").module.load_state_dict(state)
    lists = str(strict.value)
    for key in ("norm.bias", "blocks.2.norm1.weight", "extra.weight", "epoch", "pos_embed"):
        assert key in lists


def test_a_timm_checkpoint_of_another_depth_names_what_is_left_over():
    weights = saved_model("timm-vit") / "model.safetensors"
    with pytest.raises(InputError, match=rf"{weights.name} does not fit.*blocks\.2"):
        opened(timm_spec(weights, depth=2))


def test_a_timm_checkpoint_without_some_weights_names_them():
    weights = saved_model("timm-vit") / "model.safetensors"
    with pytest.raises(InputError, match=r"12 missing: blocks\.3.*, \.\."):
        opened(timm_spec(weights, depth=4))


def test_a_checkpoint_that_holds_no_weights_is_an_input_error(tmp_path):
    path = tmp_path / "w.pth"
    path.write_text("no weights at all")
    with pytest.raises(InputError):
        opened(timm_spec(path))


def test_an_argument_that_the_timm_model_does_not_take_is_named():
    weights = saved_model("timm-vit") / "model.safetensors"
    with pytest.raises((InputError, UsageError), match="colour") as caught:
        opened(timm_spec(weights, colour="red"))
    assert "num_classes" in caught.value.hint


@pytest.mark.parametrize("content", [b"junk", b"", b"\x80\x02junk", b"PK\x03\x04" + b"0" * 99])
def test_a_pickle_that_is_none_is_damaged_weights(content, tmp_path):
    path = tmp_path / "w.pt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"w\.pt"):
        opened(timm_spec(path))


@pytest.mark.parametrize("key", ["num_classes", "image_size"])
def test_an_argument_that_is_no_number_is_a_usage_error(key):
    with pytest.raises(UsageError, match=f"{key}=ten .* is not a number"):
        opened(f"torchvision:resnet18?{key}=ten")


def test_a_timm_name_without_the_network_is_an_input_error(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_, **__):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", offline)
    with pytest.raises(InputError, match=f"timm:{TIMM_NAME}"):
        opened(f"timm:{TIMM_NAME}")


def test_a_timm_directory_of_an_unknown_architecture_is_an_input_error(tmp_path):
    folder = copy_of(saved_model("timm-vit"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architecture": "vit_imaginary"}))
    with pytest.raises(InputError, match="vit_imaginary"):
        opened(folder)


def test_the_transform_of_a_timm_directory_normalises_as_its_config_says():
    from PIL import Image

    pixels = shared_model("timm-vit").processor(Image.new("RGB", (50, 40), (255, 0, 255)))
    expected = (torch.tensor([1.0, 0.0, 1.0]) - torch.tensor([0.4, 0.5, 0.6])) / torch.tensor(
        [0.2, 0.25, 0.3]
    )
    torch.testing.assert_close(pixels.mean(dim=(1, 2)), expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("name", IMAGE_FAMILIES)
def test_the_processor_makes_images_of_the_size_the_model_takes(name):
    from PIL import Image

    pixels = shared_model(name).processor(Image.new("RGB", (50, 40)))
    assert pixels.shape == (3, 32, 32)


def test_a_timm_model_that_is_not_square_gets_images_of_its_shape(tmp_path):
    from helpers.models import new_timm_vit
    from PIL import Image

    torch.save(new_timm_vit(img_size=(32, 48)).state_dict(), tmp_path / "w.pth")
    model = opened(timm_spec(tmp_path / "w.pth", img_size="[32,48]"))
    for size in ((50, 40), (20, 70), (48, 32)):
        pixels = model.processor(Image.new("RGB", size))
        assert pixels.shape == (3, 32, 48)
        with torch.no_grad():
            assert model.output({"x": pixels[None]}).shape == (1, 1, 5)


def test_the_size_a_model_was_built_for_is_found_wherever_its_patches_are_made(tmp_path):
    """MLP-Mixer calls its patch embedding `stem`."""
    torch.save(timm.create_model("mixer_s32_224", num_classes=5, img_size=64).state_dict(), tmp_path / "w.pt")
    _, module, _, _ = open_module(
        f"timm:mixer_s32_224?checkpoint={tmp_path / 'w.pt'}&num_classes=5&img_size=64"
    )
    assert module.pretrained_cfg["input_size"] == (3, 64, 64)


def test_the_transform_of_a_timm_name_follows_an_image_size_among_its_arguments():
    from PIL import Image

    model = opened(timm_spec(saved_model("timm-vit") / "model.safetensors"))
    assert model.processor(Image.new("L", (50, 40))).shape == (3, 32, 32)
