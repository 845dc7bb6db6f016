"""Writing pruned models and loading them back: the round trip of every family."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.artefacts import keep_sets, kept_of
from helpers.families import ALL, TEXT_FAMILIES
from helpers.models import copy_of, in_dtype, opened, saved_model, shared_model
from helpers.pruning import sliced_copy
from helpers.runs import examples, outputs, random_inputs, same_outputs
from helpers.tokenizers import vocabulary
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from optin_cli.errors import ArtefactError, InputError
from optin_cli.loading.checkpoint import load


@pytest.mark.parametrize("name", ALL)
@examples(6, shrink=False)
@given(data=st.data())
def test_a_pruned_directory_loads_bitwise_equal(name, tmp_path_factory, data):
    keep = data.draw(keep_sets(shared_model(name).anatomy))
    folder = tmp_path_factory.mktemp("pruned") / "m"
    pruned = sliced_copy(saved_model(name), folder, keep)
    again = opened(folder)
    assert again.anatomy == pruned.anatomy
    assert {site.name: site.units for site in again.anatomy if site.name in keep} == {
        site: len(kept) for site, kept in keep.items()
    }
    assert same_outputs(again, pruned)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kept", [[], [2]], ids=["none", "one"])
def test_a_directory_with_next_to_nothing_left_loads_bitwise_equal(name, kept, tmp_path):
    pruned = sliced_copy(
        saved_model(name), tmp_path / "m", {s.name: kept for s in shared_model(name).anatomy}
    )
    assert same_outputs(opened(tmp_path / "m"), pruned)


@pytest.mark.parametrize("head", ["encoder", "tagger", "reader"])
@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_a_pruned_directory_keeps_its_task(name, head, tmp_path):
    keep = {"blocks.0.heads": [1, 3], "blocks.2.neurons": [0, 5, 63]}
    pruned = sliced_copy(saved_model(name, head), tmp_path / "m", keep)
    again = opened(tmp_path / "m")
    assert again.task == pruned.task
    assert type(again.module) is type(pruned.module)
    assert same_outputs(again, pruned)


@pytest.mark.parametrize("name", ALL)
@examples(4, shrink=False)
@given(data=st.data())
def test_a_pruned_directory_can_be_pruned_again(name, tmp_path_factory, data):
    anatomy = shared_model(name).anatomy
    first = data.draw(keep_sets(anatomy))
    second = {s.name: data.draw(kept_of(len(first.get(s.name, range(s.units))))) for s in anatomy}
    folder = tmp_path_factory.mktemp("pruned")
    sliced_copy(saved_model(name), folder / "once", first)
    twice = sliced_copy(folder / "once", folder / "twice", second)
    again = opened(folder / "twice")
    assert same_outputs(again, twice)
    assert again.dense == shared_model(name).dense


@pytest.mark.parametrize("name", ALL)
def test_a_pruned_directory_is_smaller_on_disk(name, tmp_path):
    keep = {site.name: [0] for site in shared_model(name).anatomy}
    sliced_copy(saved_model(name), tmp_path / "m", keep)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path / "m", saved_model(name))]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("name", ALL)
def test_a_pruned_directory_brings_its_processor(name, tmp_path):
    sliced_copy(saved_model(name), tmp_path / "m", {"blocks.0.heads": [0]})
    one, other = opened(tmp_path / "m").processor, shared_model(name).processor
    if name in TEXT_FAMILIES:
        assert one.tokenizer.get_vocab() == vocabulary(name)
        assert one.max_length == other.max_length
    else:
        from PIL import Image

        image = Image.effect_noise((50, 40), 80)
        assert torch.equal(one(image), other(image))


def test_extra_files_are_copied_unchanged_with_their_folders(tmp_path):
    folder = copy_of(saved_model("bert", "encoder"), tmp_path / "dense")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    (folder / "modules.json").write_text("[]")
    (folder / "notes.txt").write_text("mine")
    sliced_copy(folder, tmp_path / "m", {"blocks.0.heads": [0]})
    for file in ("1_Pooling/config.json", "modules.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "m" / file).read_bytes() == (folder / file).read_bytes()
    assert not (tmp_path / "m" / "notes.txt").exists()
    assert opened(tmp_path / "m").task.pooling == "cls"


@pytest.mark.parametrize("name", ["bert", "timm-vit"])
def test_a_pruned_copy_keeps_the_dtype_on_disk(name, tmp_path):
    dense = in_dtype(saved_model(name), tmp_path / "dense", "float16")
    pruned = sliced_copy(dense, tmp_path / "m", {"blocks.1.heads": [0, 3]})
    weights = load_file(tmp_path / "m" / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float16}
    again = opened(tmp_path / "m")
    assert again.stored_dtype == torch.float16
    pruned.module.float()
    assert same_outputs(again, pruned)


@pytest.mark.parametrize("name", ["bert", "timm-vit"])
def test_saving_leaves_the_model_in_the_dtype_it_computes_in(name, tmp_path):
    dense = in_dtype(saved_model(name), tmp_path / "dense", "float16")
    assert sliced_copy(dense, tmp_path / "m", {"blocks.1.heads": [0, 3]}).dtype == torch.float32


def test_a_pruned_directory_needs_no_registered_family(tmp_path, monkeypatch):
    from optin_cli.architectures import families

    pruned = sliced_copy(saved_model("bert"), tmp_path / "m", {"blocks.0.heads": [2]})
    monkeypatch.setattr(families, "_REGISTRY", {})
    assert same_outputs(opened(tmp_path / "m"), pruned)


def test_a_pruned_classifier_opens_as_an_embedding_model_on_request(tmp_path):
    keep = {"blocks.0.heads": [2], "blocks.1.neurons": []}
    sliced_copy(saved_model("bert"), tmp_path / "m", keep)
    embedding = opened(tmp_path / "m", task="embedding")
    other = sliced_copy(saved_model("bert"), tmp_path / "other", keep, task="embedding")
    assert same_outputs(embedding, other)


@pytest.mark.parametrize("name", ALL)
def test_load_gives_a_module_ready_to_run_or_train(name, tmp_path):
    pruned = sliced_copy(saved_model(name), tmp_path / "m", {"blocks.0.heads": [1]})
    module = load(tmp_path / "m")
    assert isinstance(module, nn.Module) and not module.training
    assert all(p.requires_grad for p in module.parameters())
    inputs = random_inputs(pruned)
    assert torch.equal(outputs(pruned, module, inputs), outputs(pruned, pruned.module, inputs))


def test_load_is_at_the_top_of_the_package():
    import optin_cli

    assert optin_cli.load is load


@pytest.mark.parametrize(
    ("site", "kept"),
    [
        ("blocks.0.heads", [1, 2]),  # the weights have one head
        ("blocks.0.heads", [4]),
        ("blocks.0.heads", ["1"]),
        ("blocks.0.heads", 1),
        ("blocks.9.heads", [1]),
    ],
    ids=["size", "index", "word", "number", "site"],
)
@pytest.mark.parametrize("name", ["bert", "timm-vit"])
def test_weights_that_do_not_fit_the_record_are_one_clear_error(name, site, kept, tmp_path):
    sliced_copy(saved_model(name), tmp_path / "m", {"blocks.0.heads": [1]})
    record = json.loads((tmp_path / "m" / "optin.json").read_text())
    record["kept"][site] = kept
    (tmp_path / "m" / "optin.json").write_text(json.dumps(record))
    with pytest.raises((InputError, ArtefactError), match=str(tmp_path)):
        opened(tmp_path / "m")
