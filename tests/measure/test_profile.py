"""Where the time goes: every layer of a site once, nothing twice, and the rest elsewhere."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from helpers.cli import run
from helpers.families import ALL
from helpers.models import saved_model, shared_model

from optin_cli.errors import UsageError
from optin_cli.measure import profile as profiling
from optin_cli.measure.attention import attention_backend
from optin_cli.measure.first_load import first_forward
from optin_cli.measure.inputs import default_size, dummy_inputs
from optin_cli.measure.latency import bench
from optin_cli.measure.profile import profile, regions


@pytest.mark.parametrize("name", ALL)
def test_regions_cover_every_layer_of_every_site_and_none_is_in_another(name):
    model = shared_model(name)
    found = regions(model)
    for path in found:
        model.module.get_submodule(path)
        assert not any(other != path and other.startswith(f"{path}.") for other in found)
    for site in model.anatomy:
        for path in (*(producer.path for producer in site.producers), site.consumer, *site.carried):
            assert any(path == region or path.startswith(f"{region}.") for region in found), path
    assert set(found.values()) <= {site.name for site in model.anatomy}


def test_heads_have_all_of_attention_and_neurons_their_two_layers():
    found = regions(shared_model("bert"))
    heads = [path for path, name in found.items() if name == "blocks.0.heads"]
    neurons = [path for path, name in found.items() if name == "blocks.0.neurons"]
    assert [path.endswith("attention") for path in heads] == [True]
    assert sorted(path.rpartition("layer.0.")[2] for path in neurons) == [
        "intermediate.dense",
        "output.dense",
    ]


def test_the_parts_add_up_to_the_whole(monkeypatch):
    """A clock that ticks once at each look: the time of a region is known exactly."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(profiling._Clock, "now", lambda self: next(ticks))
    monkeypatch.setattr(profiling._Clock, "ms", lambda self, begin, end: float(end - begin))
    model = shared_model("bert")
    found = profile([model, model], 2, 8, repeats=3, seconds=0.0)
    # whole forwards take one tick without clocks; with them two for each region, and one
    count = len(regions(model))
    by_site: dict[str, int] = {}
    for name in regions(model).values():
        by_site[name] = by_site.get(name, 0) + 1
    for site in found.sites:
        assert site.ms == pytest.approx((by_site[site.site] / (2 * count + 1),) * 2)
    assert found.total_ms == (1.0, 1.0) and found.rounds == 3
    for index in range(2):
        total = sum(site.ms[index] for site in found.sites) + found.elsewhere_ms[index]
        assert total == pytest.approx(found.total_ms[index])


def test_clocks_are_gone_afterwards():
    model = shared_model("bert")
    profile([model], 1, 8, repeats=1, seconds=0.0)
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.module.modules())


def test_a_profile_on_the_command_line():
    model = saved_model("bert")
    options = ["--baseline", model, "--batch-size", "2", "--seq-len", 8, "--repeats", 2, "--seconds", 0]
    shown = run("bench", model, *options, "--profile").stdout
    assert "blocks.0.heads" in shown and "elsewhere" in shown and "all neurons" in shown
    (found,) = json.loads(run("bench", model, *options, "--profile", "--json").stdout)["profiles"]
    assert found["batch_size"] == 2 and len(found["total_ms"]) == 2
    assert {site["kind"] for site in found["sites"]} == {"heads", "neurons"}
    refused = run("bench", model, "--profile", "--compile", code=2)
    assert "--profile looks into models as they are" in refused.stderr


def test_an_exported_file_is_not_looked_into():
    exported = dataclasses.replace(shared_model("bert"), runtime=object())
    with pytest.raises(UsageError, match="exported file"):
        profile([exported], 1, 8, repeats=1, seconds=0.0)
    assert attention_backend(exported, dummy_inputs(exported, 1, 8)) == ""
    assert first_forward(exported, 1, 8) == (None, None)


# ---- the attention backend ----


@pytest.mark.parametrize(
    ("implementation", "named"), [("eager", "eager"), ("sdpa", "sdpa (")], ids=["eager", "sdpa"]
)
def test_the_backend_is_what_the_model_calls(implementation, named, monkeypatch):
    model = shared_model("bert")
    monkeypatch.setattr(model.module.config, "_attn_implementation", implementation)
    assert attention_backend(model, dummy_inputs(model, 1, 8)).startswith(named)


def test_the_kernel_is_the_one_that_torch_is_told_to_take(monkeypatch):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model = shared_model("bert")
    monkeypatch.setattr(model.module.config, "_attn_implementation", "sdpa")
    inputs = dummy_inputs(model, 1, 8)
    with sdpa_kernel(SDPBackend.MATH):
        assert attention_backend(model, inputs) == "sdpa (math)"
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert attention_backend(model, inputs) == "sdpa (flash)"


def test_a_model_without_heads_has_none():
    model = shared_model("timm-resnet")
    assert attention_backend(model, dummy_inputs(model, 1, default_size(model))) == ""


# ---- the first load ----


def test_the_first_load_is_timed_where_there_are_files():
    from optin_cli.loading.checkpoint import open_model

    model = open_model(str(saved_model("bert")), device="cpu")
    timed = bench([model], [1, 2], [8], repeats=1, seconds=0.0, first_load=True)
    assert all(one.load_ms > 0 and one.first_ms > 0 for one in timed)
    assert timed[0].load_ms == timed[1].load_ms
    (untimed,) = bench([model], [1], [8], repeats=1, seconds=0.0)
    assert (untimed.load_ms, untimed.first_ms) == (None, None)


def test_a_module_in_memory_has_no_first_load(monkeypatch):
    import optin_cli as optin

    held = optin.open_model(shared_model("bert").module, processor=shared_model("bert").processor.tokenizer)
    (timing,) = bench([held], [1], [8], repeats=1, seconds=0.0, first_load=True)
    assert timing.load_ms is None and torch.is_tensor(next(held.module.parameters()))
