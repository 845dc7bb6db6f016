"""The benchmark's bookkeeping: inputs, settings, rounds, ratios. Never the wall clock itself."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from helpers.families import ALL, IMAGE_FAMILIES, IMAGE_SIZE, MAX_LENGTH, TEXT_FAMILIES
from helpers.models import shared_model, tiny_model

from optin_cli.architectures.resolve import dissect
from optin_cli.errors import UsageError
from optin_cli.execution.macs import count_macs
from optin_cli.loading.checkpoint import OpenModel, open_model
from optin_cli.measure import latency
from optin_cli.measure.inputs import default_size, dummy_inputs
from optin_cli.measure.latency import (
    Setting,
    bench,
    efficiency,
    ideal_speedup,
    speedup,
)
from optin_cli.measure.memory import peak_memory
from optin_cli.transforms.slicing import slice_model

FAST = {"repeats": 2, "seconds": 0.0, "warmup": 1}


def pruned(model: OpenModel, keep: dict[str, list[int]]) -> OpenModel:
    module = copy.deepcopy(model.module)
    slice_model(module, model.anatomy, keep)
    return dataclasses.replace(model, module=module, anatomy=dissect(module, model.family))


@pytest.fixture
def clock(monkeypatch):
    """Each forward takes one millisecond an example and model index; records (model, batch) of every call."""
    calls: list[tuple[str, int]] = []

    def forward_ms(model, inputs):
        batch = next(iter(inputs.values())).shape[0]
        calls.append((model.spec, batch))
        return float(batch)

    monkeypatch.setattr(latency, "_forward_ms", forward_ms)
    return calls


@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_dummy_text_has_no_special_tokens_and_no_padding(name):
    model = shared_model(name)
    inputs = dummy_inputs(model, 64, 50)
    assert inputs["input_ids"].shape == (64, 50)
    special = set(model.processor.tokenizer.all_special_ids)
    found = set(inputs["input_ids"].unique().tolist())
    assert not found & special
    assert found == set(range(model.module.config.vocab_size)) - special  # 3,200 draws miss none of ~80
    assert bool((inputs["attention_mask"] == 1).all())
    assert ("token_type_ids" in inputs) == (name in ("bert", "electra"))
    model.module(**inputs)


@pytest.mark.parametrize("name", IMAGE_FAMILIES)
def test_dummy_images_fit_the_model(name):
    model = shared_model(name)
    inputs = dummy_inputs(model, 2, default_size(model))
    assert {k: tuple(v.shape) for k, v in inputs.items()} == {
        "x" if name == "timm-vit" else "pixel_values": (2, 3, IMAGE_SIZE, IMAGE_SIZE)
    }
    assert next(iter(inputs.values())).dtype == model.dtype
    model.module(**inputs)


def test_dummy_inputs_go_by_the_seed():
    model = shared_model("bert")
    first, again, other = (dummy_inputs(model, 4, 16, seed)["input_ids"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_default_size_is_the_models_own():
    assert default_size(shared_model("bert")) == MAX_LENGTH  # shorter than 128
    assert default_size(shared_model("timm-vit")) == IMAGE_SIZE


@pytest.mark.parametrize("name", ["bert", "roberta", "mpnet"])
def test_the_longest_sequence_runs_and_one_more_is_refused(name):
    model = shared_model(name)
    model.module(**dummy_inputs(model, 1, MAX_LENGTH))
    with pytest.raises(UsageError, match=f"up to {MAX_LENGTH} tokens, not {MAX_LENGTH + 1}"):
        dummy_inputs(model, 1, MAX_LENGTH + 1)


@pytest.mark.parametrize("name", IMAGE_FAMILIES)
def test_another_image_size_is_refused(name):
    with pytest.raises(UsageError, match="takes images of 32 x 32 pixels, not 48 x 48"):
        bench([shared_model(name)], [1], [48], **FAST)


def test_a_model_of_any_image_size_takes_another(tmp_path):
    model = open_model(str(tiny_model("timm-vit", tmp_path, dynamic_img_size=True)), device="cpu")
    (timing,) = bench([model], [1], [48], **FAST)
    assert timing.setting == Setting(1, 48)
    assert ideal_speedup(model, model, 48) == 1


@pytest.mark.parametrize(("batch", "size"), [(0, 8), (1, 0), (-1, 8)])
def test_sizes_below_one_are_refused(batch, size):
    with pytest.raises(UsageError, match="at least 1"):
        bench([shared_model("bert")], [batch], [size], **FAST)


def test_nothing_to_time():
    with pytest.raises(UsageError, match="nothing to time"):
        bench([], [1])


def test_text_and_image_models_do_not_mix():
    with pytest.raises(UsageError, match="models of texts, images and recordings"):
        bench([shared_model("bert"), shared_model("vit")], [1], **FAST)


def test_a_bad_setting_is_refused_before_anything_runs(clock):
    with pytest.raises(UsageError):
        bench([shared_model("bert")], [1], [8, MAX_LENGTH + 1], **FAST)
    assert clock == []


@pytest.mark.parametrize("name", ALL)
def test_facts_of_a_timing(name):
    model = shared_model(name)
    size = default_size(model)
    (timing,) = bench([model], [2], **FAST)
    assert (timing.model, timing.setting) == (model.spec, Setting(2, size))
    assert (timing.device, timing.dtype, timing.rounds) == ("cpu", "float32", 2)
    assert timing.threads == torch.get_num_threads()
    assert timing.params == sum(p.numel() for p in model.module.parameters())
    assert timing.macs == count_macs(model, dummy_inputs(model, 1, size))
    assert timing.peak_memory == peak_memory(model, dummy_inputs(model, 2, size))
    assert 0 < timing.p10_ms <= timing.median_ms <= timing.p90_ms
    assert timing.throughput == pytest.approx(2000 / timing.median_ms)


def test_settings_come_in_order_and_progress_ends_at_the_total():
    seen: list[tuple[int, int, str]] = []
    model = shared_model("bert")
    timings = bench([model], [1, 2], [8, 4], **FAST, on_progress=lambda *step: seen.append(step))
    assert [t.setting for t in timings] == [Setting(b, s) for s in (8, 4) for b in (1, 2)]
    assert [step[:2] for step in seen] == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]


def test_models_take_turns_and_the_first_changes(clock):
    models = [shared_model(name) for name in ("bert", "electra", "distilbert")]
    bench(models, [4], [8], repeats=4, seconds=0.0, warmup=2)
    a, b, c = (model.spec for model in models)
    order = [spec for spec, batch in clock if batch == 4]
    assert order[:6] == [a, b, c] * 2  # warm-up
    assert order[6:] == [a, b, c, b, c, a, c, a, b, a, b, c]


def test_rounds_go_on_until_the_seconds_are_spent_but_not_for_ever(clock):
    (timing,) = bench([shared_model("bert")], [4], [8], repeats=2, seconds=60.0)
    assert timing.rounds == latency._MOST_ROUNDS


def test_quantiles_are_numpys(monkeypatch):
    times = iter(range(1, 1000))
    monkeypatch.setattr(latency, "_forward_ms", lambda model, inputs: float(next(times)))
    (timing,) = bench([shared_model("bert")], [1], [8], repeats=21, seconds=0.0, warmup=4)
    timed = np.arange(5, 26)
    assert (timing.p10_ms, timing.median_ms, timing.p90_ms) == tuple(np.percentile(timed, [10, 50, 90]))
    assert timing.doubling == np.median(np.arange(27, 32)) / 15


@pytest.mark.parametrize(("factor", "saturated"), [(1.0, False), (1.49, False), (1.5, True), (2.1, True)])
def test_saturation_is_time_at_twice_the_batch(monkeypatch, factor, saturated):
    def forward_ms(model, inputs):
        return 10.0 * (factor if len(inputs["input_ids"]) == 6 else 1)

    monkeypatch.setattr(latency, "_forward_ms", forward_ms)
    (timing,) = bench([shared_model("bert")], [3], [8], **FAST)
    assert timing.doubling == pytest.approx(factor)
    assert timing.saturated is saturated


def test_twice_the_batch_may_not_fit(monkeypatch):
    def forward_ms(model, inputs):
        if len(inputs["input_ids"]) > 3:
            raise torch.OutOfMemoryError("full")
        return 1.0

    monkeypatch.setattr(latency, "_forward_ms", forward_ms)
    (timing,) = bench([shared_model("bert")], [3], [8], **FAST)
    assert timing.doubling is None
    assert timing.saturated
    with pytest.raises(UsageError, match="batch of 4 at size 8 does not fit"):
        bench([shared_model("bert")], [4], [8], **FAST)


@pytest.mark.parametrize("name", ALL)
def test_ideal_speedup_is_the_ratio_of_torchs_counts_in_the_blocks(name):
    model = shared_model(name)
    half = pruned(model, {site.name: list(range(site.units // 2)) for site in model.anatomy})
    assert ideal_speedup(model, half, default_size(model)) == pytest.approx(2)
    assert ideal_speedup(model, model, default_size(model)) == 1


def test_ideal_speedup_without_any_block_is_infinite():
    model = shared_model("bert")
    nothing = pruned(model, {site.name: [] for site in model.anatomy})
    assert ideal_speedup(model, nothing, 8) == float("inf")


def test_speedup_and_efficiency():
    (timing,) = bench([shared_model("bert")], [1], [8], **FAST)
    dense, fast = (dataclasses.replace(timing, median_ms=ms) for ms in (30.0, 20.0))
    assert speedup(dense, fast) == 1.5
    assert efficiency(1.5, 2.0) == 0.75
    with pytest.raises(ValueError, match="different settings"):
        speedup(dense, dataclasses.replace(fast, setting=Setting(2, 8)))
