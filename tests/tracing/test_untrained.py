"""Tracing without weights: a config is enough, and nothing but configs is fetched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from helpers.cli import run
from helpers.families import TIMM_NAME
from helpers.models import new_folder, saved_model
from helpers.traced import save_unlisted
from huggingface_hub.utils import filter_repo_objects

from optin_cli.architectures.families import family_to_dict
from optin_cli.errors import InputError
from optin_cli.loading.checkpoint import open_module
from optin_cli.loading.sources import resolve
from optin_cli.tracing.propose import propose

SMALL = "?img_size=32&patch_size=8&embed_dim=48&depth=2&num_heads=4&mlp_ratio=2"
"""A query that makes `TIMM_NAME` tiny."""


def without_weights(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    return target


@pytest.fixture
def no_hub(monkeypatch):
    """Fails where weights are fetched by timm or torchvision."""

    def refuse(*_, **__):
        raise AssertionError("weights were fetched")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", refuse)
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("ernie", "ForSequenceClassification"),
        pytest.param("granite", "ForCausalLM", marks=pytest.mark.slow),
        ("bert", None),
    ],
)
def test_a_config_alone_has_the_table_of_the_trained_model(name, head, tmp_path):
    trained = save_unlisted(name, new_folder() / name, head) if head else saved_model(name)
    config = without_weights(trained, tmp_path / "config-only")
    assert not list(config.glob("*.safetensors"))
    found, expected = propose(str(config)), propose(str(trained))
    assert (found.untrained, expected.untrained) == (True, False)
    assert family_to_dict(found.family) == family_to_dict(expected.family)
    assert [row.units for row in found.rows] == [row.units for row in expected.rows]


def test_a_folder_in_the_layout_of_timm_needs_no_weights(tmp_path, no_hub):
    trained = saved_model("timm-vit")
    found = propose(str(without_weights(trained, tmp_path / "config-only")))
    assert found.untrained
    assert family_to_dict(found.family) == family_to_dict(propose(str(trained)).family)


def test_a_timm_name_is_built_without_its_weights(no_hub):
    found = propose(f"timm:{TIMM_NAME}{SMALL}")
    assert found.untrained and len(found.anatomy.blocks) == 2
    assert {row.table.kind for row in found.rows} == {"heads", "neurons"}


def test_a_checkpoint_is_used(tmp_path):
    module = open_module(f"timm:{TIMM_NAME}{SMALL}", weights=False)[1]
    torch.save(module.state_dict(), tmp_path / "w.pth")
    source, read, *_ = open_module(f"timm:{TIMM_NAME}{SMALL}&checkpoint={tmp_path}/w.pth", weights=False)
    assert not source.untrained
    assert all(torch.equal(value, read.state_dict()[key]) for key, value in module.state_dict().items())


def test_a_torchvision_name_is_built_without_its_weights(no_hub):
    source, module, *_ = open_module("torchvision:mobilenet_v2", weights=False)
    assert source.untrained and module.num_classes == 1000


def test_random_weights_are_the_same_every_time(tmp_path):
    config = without_weights(saved_model("bert"), tmp_path / "m")
    draw = torch.random.get_rng_state()
    first = run("families", "--trace", config, "-q").stdout
    assert torch.equal(draw, torch.random.get_rng_state())  # and the caller's stream is left alone
    torch.manual_seed(7)
    assert run("families", "--trace", config, "-q").stdout == first


def test_only_the_configs_of_a_hub_model_are_fetched(tmp_path, monkeypatch):
    repository = saved_model("bert")
    fetched: list[str] = []

    def snapshot(repo_id: str, allow_patterns: list[str]) -> str:
        files = [path.name for path in repository.iterdir()]
        fetched.extend(filter_repo_objects(files, allow_patterns=allow_patterns))
        for name in fetched:
            shutil.copy(repository / name, tmp_path / name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert propose("org/some-model").untrained
    assert "config.json" in fetched and all(name.endswith("config.json") for name in fetched)


def test_an_index_without_all_of_its_shards_counts_as_no_weights(tmp_path):
    config = without_weights(saved_model("bert"), tmp_path / "m")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (config / "model.safetensors.index.json").write_text(json.dumps(index))
    (config / "model-00001-of-00002.safetensors").write_text("half of it")
    source = resolve(str(config), weights=False)
    assert source.untrained and source.weight_files() == []
    with pytest.raises(InputError, match="lacks the shards"):
        resolve(str(config))


def test_one_line_says_that_weights_are_random(tmp_path):
    config = without_weights(saved_model("bert"), tmp_path / "m")
    told = run("families", "--trace", config)
    assert told.stderr.count("random weights") == 1
    assert "random weights" not in run("families", "--trace", saved_model("bert")).stderr
    assert json.loads(run("families", "--trace", config, "--json", "-q").stdout)["random_weights"] is True


def test_every_other_command_still_wants_weights(tmp_path):
    config = without_weights(saved_model("bert"), tmp_path / "m")
    assert "holds no weights" in run("bench", config, code=1).stderr
