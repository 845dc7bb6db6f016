"""`bench`, memory, tables and `evaluate` on a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.cli import run
from helpers.compensation import copied, half
from helpers.memory import words
from helpers.models import saved_model

from optin_cli.architectures.resolve import dissect
from optin_cli.data.batches import Batches
from optin_cli.data.examples import sample
from optin_cli.errors import UsageError
from optin_cli.loading.checkpoint import OpenModel, open_model
from optin_cli.measure.evaluate import evaluate
from optin_cli.measure.inputs import dummy_inputs
from optin_cli.measure.latency import Setting, bench, call_ms
from optin_cli.measure.latency_table import make_table
from optin_cli.measure.memory import peak_memory, weight_bytes
from optin_cli.measure.runners import Execution, prepared
from optin_cli.transforms.slicing import slice_model

pytestmark = pytest.mark.cuda

FAST = {"repeats": 2, "seconds": 0.0, "warmup": 1}


def opened(name: str, device: str, dtype: str = "float32") -> OpenModel:
    return open_model(str(saved_model(name)), device=device, dtype=dtype)


def pruned(model: OpenModel) -> OpenModel:
    small = copied(model)
    slice_model(small.module, model.anatomy, half(model))
    return dataclasses.replace(small, anatomy=dissect(small.module, model.family))


@pytest.mark.parametrize("name", ["bert", "llama", "vit", "timm-resnet"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_models_are_timed(name, dtype, device):
    model = opened(name, device, dtype)
    dense, small = bench([model, pruned(model)], [2], **FAST)
    assert (dense.dtype, small.dtype) == (dtype, dtype)
    assert small.macs < dense.macs
    assert small.median_ms > 0
    assert dense.peak_memory > weight_bytes(model.module)


def logits_of(result) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result.logits


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "llama", "vit", "deit", "timm-vit", "swin"])
def test_a_cuda_graph_gives_what_the_model_gives(name, gpu):
    model = opened(name, gpu)
    several = [model, pruned(model)]
    inputs = [dummy_inputs(one, 2, 32) for one in several]
    with torch.inference_mode(), prepared(several, inputs, Execution(cuda_graph=True)) as runners:
        for one, runner, given in zip(several, runners, inputs, strict=True):
            expected, found = logits_of(one.run(given)), logits_of(runner.run(given))
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_cuda_graph_is_timed(gpu):
    model = opened("bert", gpu)
    timings = bench([model, pruned(model)], [1], [32], **FAST, execution=Execution(cuda_graph=True))
    assert [timing.execution for timing in timings] == ["cuda graph"] * 2
    assert all(timing.doubling is not None for timing in timings)


def test_a_compiled_model_is_timed(device):
    model = opened("bert", device)
    (timing,) = bench([model], [2], [32], **FAST, execution=Execution(True, device == "cuda"))
    assert timing.setting == Setting(2, 32)
    assert timing.doubling is None


def test_what_does_not_fit_is_a_usage_error(gpu):
    model = opened("bert", gpu)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (32 << 20)) / total)
    try:
        with pytest.raises(UsageError, match=r"batch of 4096 .* does not fit in the memory of NVIDIA"):
            bench([model], [4096], [64], **FAST)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_calls_kernels_are_timed(gpu):
    """What a call only queues counts: ten times as much of it takes many times as long."""
    matrix = torch.randn(4096, 4096, device=gpu)

    def work(times: int):
        def call() -> None:
            for _ in range(times):
                matrix @ matrix

        return call

    call_ms(work(2), torch.device(gpu))
    few, many = (min(call_ms(work(n), torch.device(gpu)) for _ in range(5)) for n in (2, 20))
    assert many > 4 * few


def test_peak_memory_is_the_activations_and_the_weights(gpu):
    model = opened("bert", gpu)
    peaks = [peak_memory(model, dummy_inputs(model, batch, 64)) for batch in (64, 256)]
    weights = weight_bytes(model.module)
    assert peaks[1] - weights == pytest.approx(4 * (peaks[0] - weights), rel=0.2)


def test_a_table_is_made_of_a_model(device):
    model = opened("bert", device)
    table = make_table(model, 2, 32, repeats=2, seconds=0.0)
    assert table.setting["device"] == (torch.cuda.get_device_name() if device == "cuda" else "cpu")
    whole = {site.name: site.units for site in model.anatomy}
    assert table.model_ms(whole) == pytest.approx(table.total_ms)


def test_the_command_benches(device):
    options = ["--batch-size", "1", "--repeats", "2", "--seconds", "0", "--device", device]
    out = run("bench", saved_model("bert"), "--baseline", saved_model("bert"), *options).stdout
    assert "speed-up" in out
    if device == "cuda":
        assert "cuda graph" in run("bench", saved_model("bert"), *options, "--cuda-graph").stdout


def test_evaluate_measures_like_on_the_cpu(device):
    found = []
    for where in (device, "cpu"):
        model = opened("bert", where)
        examples = sample(words(40, 12), "text", None, 0, reader=model.task.reader)
        batches = Batches(examples, model.processor, 8, reader=model.task.reader)
        found.append(evaluate(model, batches, pruned(model)))
    ours, theirs = found
    assert ours.metrics == pytest.approx(theirs.metrics, abs=0.01)
    assert ours.fidelity == pytest.approx(theirs.fidelity, rel=1e-3)
