"""Making a latency table. The clock is replaced by torch's FLOP counter: then sub-layers add up exactly."""

from __future__ import annotations

import copy
import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers.families import ALL, BLOCKS, HEADS, INNER
from helpers.flops import flop_counter
from helpers.models import new_folder, opened, saved_model, shared_model, tiny_model
from helpers.runs import examples
from hypothesis import given
from hypothesis import strategies as st

from optin_cli.architectures.resolve import dissect
from optin_cli.artefacts.latency import LatencyTable
from optin_cli.errors import UsageError
from optin_cli.loading.checkpoint import OpenModel, open_model
from optin_cli.measure import latency_table
from optin_cli.measure.inputs import default_size, dummy_inputs
from optin_cli.measure.latency_table import make_table, settled, table_setting
from optin_cli.transforms.slicing import slice_model
from optin_cli.transforms.token_merging import install_merges

FAST = {"repeats": 1, "seconds": 0.0}


def flops(call, device=None) -> float:
    with flop_counter() as counter:
        call()
    return float(counter.get_total_flops())


@pytest.fixture
def counted(monkeypatch):
    """A clock that ticks once a FLOP."""
    monkeypatch.setattr(latency_table, "call_ms", flops)


def wide(name: str) -> OpenModel:
    """A model with heads of 16 dimensions."""
    return opened(
        tiny_model(
            name, new_folder() / name, **{"num_heads" if name == "timm-vit" else "num_attention_heads": 2}
        )
    )


def pruned(model: OpenModel, keep: dict[str, list[int]]) -> OpenModel:
    module = copy.deepcopy(model.module)
    slice_model(module, model.anatomy, keep)
    return dataclasses.replace(model, module=module, anatomy=dissect(module, model.family))


def whole_ms(model: OpenModel, batch_size: int, size: int) -> float:
    inputs = dummy_inputs(model, batch_size, size)
    with torch.inference_mode():
        return flops(lambda: model.module(**inputs))


def test_a_model_that_merges_tokens_is_timed_on_whole_sequences(counted):
    model = shared_model("timm-vit")
    merging = dataclasses.replace(model, module=copy.deepcopy(model.module))
    merging.merging = install_merges(merging.module, model.anatomy, [3, 2])
    whole, table = (make_table(one, 2, 32, **FAST) for one in (model, merging))
    assert (table.total_ms, table.curves) == (whole.total_ms, whole.curves)
    assert whole_ms(merging, 2, 32) < table.total_ms


@pytest.mark.parametrize("name", ALL)
def test_the_sum_of_the_sublayers_predicts_any_pruned_model(name, counted):
    model = shared_model(name)
    size = default_size(model)
    table = make_table(model, 2, size, **FAST)
    dense = {site.name: site.units for site in model.anatomy}
    assert table.total_ms == whole_ms(model, 2, size)
    assert table.model_ms(dense) == pytest.approx(table.total_ms)
    rng = np.random.default_rng(0)
    for _ in range(3):
        keep = {name: list(range(rng.integers(0, units + 1))) for name, units in dense.items()}
        sizes = {name: len(units) for name, units in keep.items()}
        assert table.model_ms(sizes) == pytest.approx(whole_ms(pruned(model, keep), 2, size))


@pytest.mark.parametrize("name", ["mpnet", "vit", "timm-vit"])
def test_the_times_of_ranks_predict_heads_that_are_cut(name, counted):
    model = wide(name)
    size = default_size(model)
    table = make_table(model, 2, size, **FAST)
    width = model.anatomy["blocks.0.heads"].width
    assert table.curves[0]["ranks"]["ranks"] == list(range(4, width + 1, 4))
    rng = np.random.default_rng(0)
    for rank in (4, 6, 12, width):
        keep = {site.name: list(range(rng.integers(1, site.units + 1))) for site in model.anatomy}
        ranks = {site.name: rank for site in model.anatomy if site.kind == "heads"}
        cut = dataclasses.replace(model, anatomy=model.anatomy.cut(ranks if rank < width else {}))
        sizes = {name: len(units) for name, units in keep.items()}
        assert table.model_ms(sizes, ranks) == pytest.approx(whole_ms(pruned(cut, keep), 2, size))


def test_heads_that_cannot_be_cut_are_timed_whole(counted):
    assert not make_table(shared_model("modernbert"), 1, 8, **FAST).knows_ranks()


def test_uniform_blocks_share_their_measurements(counted, monkeypatch):
    calls = []
    monkeypatch.setattr(latency_table, "call_ms", lambda call, device: calls.append(call) or flops(call))
    table = make_table(shared_model("bert"), 1, 8, **FAST)
    assert len(table.curves) == 2
    assert set(table.sites) == {site.name for site in shared_model("bert").anatomy}
    heads, neurons = (curve["counts"] for curve in table.curves)
    assert heads == list(range(HEADS + 1))
    assert neurons == list(range(0, INNER + 1, 8))
    sizes = len(heads) + len(neurons) + 1 + 2 * HEADS  # of rank 4, and whole
    assert len(calls) < 5 * (sizes + 3)  # of one block, not of all BLOCKS


def test_a_pruned_models_uneven_blocks_share_them_too(counted):
    model = shared_model("bert")
    keep = {"blocks.0.heads": [0], "blocks.1.heads": [], "blocks.2.neurons": list(range(40))}
    small = pruned(model, keep)
    table = make_table(small, 2, 8, **FAST)
    assert len(table.curves) == 2
    here = {site.name: site.units for site in small.anatomy}
    assert table.model_ms(here) == pytest.approx(whole_ms(small, 2, 8))
    further = {name: list(range(units // 2)) for name, units in here.items()}
    sizes = {name: len(units) for name, units in further.items()}
    assert table.model_ms(sizes) == pytest.approx(whole_ms(pruned(small, further), 2, 8))


def test_the_model_is_as_it_was(counted):
    model = open_model(str(saved_model("mpnet")), device="cpu")
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    make_table(model, 1, 8, **FAST)
    after = model.module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert dissect(model.module, model.family) == model.anatomy


def test_the_table_says_what_it_is_of(counted):
    model = shared_model("vit")
    table = make_table(model, 3, default_size(model), **FAST)
    assert table.setting == table_setting(model, 3, default_size(model))
    assert table.setting["device"] == "cpu"
    assert table.setting["processor"]
    assert (table.setting["dtype"], table.setting["threads"]) == ("float32", torch.get_num_threads())
    assert table.model["digest"] == table.model["dense_digest"] == model.digest
    assert len(table.sites) == 2 * BLOCKS


def test_a_real_clock_gives_a_table_too():
    table = make_table(shared_model("bert"), 1, 8, **FAST)
    assert isinstance(table, LatencyTable)
    assert table.total_ms > 0
    assert all(curve["ms"][0] == 0 for curve in table.curves)


def test_a_length_the_model_can_not_take_is_refused():
    with pytest.raises(UsageError, match="up to 64 tokens"):
        make_table(shared_model("bert"), 1, 4096, **FAST)


def test_a_batch_that_does_not_fit_is_refused(monkeypatch):
    def full(call, device):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(latency_table, "call_ms", full)
    with pytest.raises(UsageError, match="does not fit in the memory"):
        make_table(shared_model("bert"), 1, 8, **FAST)


# where the sizes are


def curve_of(shape, tmp_path, noise: float = 0.0) -> tuple[list[int], dict[int, float]]:
    """Sizes that a site of 1,024 neurons whose time has this shape is measured at, and their times."""
    model = open_model(str(tiny_model("bert", tmp_path / "wide", intermediate_size=1024)), device="cpu")
    bench = latency_table._Bench(model.anatomy["blocks.0.neurons"], None, model.device, 1, 0.0)  # type: ignore[arg-type]

    def measure(sizes):
        bench.noise = noise
        return {(n, rank): shape(n) for n, rank in sizes}

    bench._measure = measure  # type: ignore[method-assign]
    bench.run()
    return bench.curve(1.0)["counts"], bench.times


def test_a_line_needs_no_closer_look(tmp_path):
    counts, _ = curve_of(lambda n: n / 1024, tmp_path)
    assert len(counts) <= 26
    assert {0, 1024} <= set(counts)


@pytest.mark.parametrize("step", [128, 256, 512])
def test_the_edges_of_a_stair_are_found(step, tmp_path):
    counts, times = curve_of(lambda n: -(-n // step) * step / 1024, tmp_path)
    sizes = np.arange(0, 1025, 8)
    guess = np.interp(sizes, counts, [times[n] for n in counts])
    true = -(-sizes // step) * step / 1024
    assert np.mean(np.abs(guess - true) > 0.02) < 0.05
    assert len(counts) <= latency_table._MOST_SIZES


def test_noise_is_not_taken_for_a_bend(tmp_path):
    rng = np.random.default_rng(0)
    counts, _ = curve_of(lambda n: n / 1024 + rng.normal(0, 0.05), tmp_path, noise=0.05)
    assert len(counts) <= 26


@examples(100)
@given(st.lists(st.floats(0, 10), min_size=1, max_size=12), st.floats(0, 3))
def test_small_falls_are_averaged_and_large_ones_stay(times, noise):
    made = settled(times, noise)
    assert sum(made) == pytest.approx(sum(times))
    falls = [a - b for a, b in pairwise(made) if a - b > 1e-9]
    assert all(fall > noise - 1e-9 for fall in falls)
    if all(a <= b for a, b in pairwise(times)):
        assert made == pytest.approx(times)
