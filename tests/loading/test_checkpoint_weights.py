"""Weights on disk: sharded, pickled, malicious, truncated, of another size."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from helpers.families import TIMM_NAME
from helpers.models import copy_of, new_model, opened, saved_model, shared_model
from helpers.runs import same_outputs
from safetensors.torch import load_file

from optin_cli.errors import InputError

# layouts of weights


def test_sharded_safetensors_load(tmp_path):
    folder = copy_of(saved_model("bert"), tmp_path)
    (folder / "model.safetensors").unlink()
    new_model("bert").save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert same_outputs(opened(folder), shared_model("bert"))


def test_a_missing_shard_is_an_input_error(tmp_path):
    new_model("bert").save_pretrained(tmp_path, max_shard_size="40KB")
    sorted(tmp_path.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(InputError, match="model-00002"):
        opened(tmp_path)


def with_pickled_weights(folder: Path, target: Path) -> Path:
    copy_of(folder, target)
    torch.save(load_file(target / "model.safetensors"), target / "pytorch_model.bin")
    (target / "model.safetensors").unlink()
    return target


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_pickled_tensors_load(name, tmp_path):
    assert same_outputs(opened(with_pickled_weights(saved_model(name), tmp_path)), shared_model(name))


def test_sharded_pickled_tensors_load(tmp_path):
    folder = copy_of(saved_model("bert"), tmp_path)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    keys = sorted(weights)
    index = {}
    for number, part in enumerate((keys[::2], keys[1::2]), start=1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({key: weights[key] for key in part}, folder / file)
        index.update(dict.fromkeys(part, file))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert same_outputs(opened(folder), shared_model("bert"))


class Malicious:
    """Unpickling it makes a file: proof that code ran."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return Path.touch, (self.proof,)


def malicious_weights(path: Path, proof: Path) -> None:
    torch.save({"weight": torch.zeros(1), "code": Malicious(proof)}, path)


def test_the_malicious_pickle_of_these_tests_does_run_code(tmp_path):
    malicious_weights(tmp_path / "w.bin", tmp_path / "proof")
    torch.load(tmp_path / "w.bin", weights_only=False)
    assert (tmp_path / "proof").exists()


def test_a_malicious_pickle_is_refused_and_never_run(tmp_path):
    folder = with_pickled_weights(saved_model("bert"), tmp_path / "model")
    malicious_weights(folder / "pytorch_model.bin", tmp_path / "proof")
    with pytest.raises(InputError, match="hold more than tensors"):
        opened(folder)
    assert not (tmp_path / "proof").exists()


def test_a_malicious_old_style_pickle_is_refused_and_never_run(tmp_path):
    folder = with_pickled_weights(saved_model("bert"), tmp_path / "model")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Malicious(tmp_path / "proof")}))
    with pytest.raises(InputError):
        opened(folder)
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("suffix", ["pth", "bin"])
def test_a_malicious_timm_checkpoint_is_refused_and_never_run(suffix, tmp_path):
    path = tmp_path / f"weights.{suffix}"
    malicious_weights(path, tmp_path / "proof")
    with pytest.raises(InputError, match="hold more than tensors"):
        opened(f"timm:{TIMM_NAME}?checkpoint={path}")
    assert not (tmp_path / "proof").exists()


def test_a_malicious_pickle_beside_safetensors_is_not_even_read(tmp_path):
    folder = copy_of(saved_model("bert"), tmp_path / "model")
    malicious_weights(folder / "pytorch_model.bin", tmp_path / "proof")
    assert same_outputs(opened(folder), shared_model("bert"))
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.99])
@pytest.mark.parametrize("name", ["bert", "timm-vit"])
def test_truncated_safetensors_are_an_input_error(name, share, tmp_path):
    folder = copy_of(saved_model(name), tmp_path)
    truncate(folder / "model.safetensors", share)
    with pytest.raises(InputError, match=str(folder)):
        opened(folder)


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_truncated_pickles_are_an_input_error(share, tmp_path):
    folder = with_pickled_weights(saved_model("bert"), tmp_path)
    truncate(folder / "pytorch_model.bin", share)
    with pytest.raises(InputError, match=str(folder)):
        opened(folder)


def truncate(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def test_weights_of_another_size_than_the_config_says_are_an_input_error(tmp_path):
    folder = copy_of(saved_model("bert"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(InputError, match=str(folder)) as caught:
        opened(folder)
    told = caught.value.what
    assert (
        "9 of another shape: bert.encoder.layer.0.intermediate.dense.bias (64 in the file, 48 in the model)"
        in told
    )
    assert "dense.weight (64x32 in the file, 48x32 in the model)" in told
    assert "config.json" in caught.value.hint
