"""How forwards are run while they are timed: compiled, and what only a GPU can do."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from helpers.cli import run
from helpers.models import saved_model, shared_model

from optin_cli.errors import UsageError
from optin_cli.measure import latency
from optin_cli.measure.inputs import dummy_inputs
from optin_cli.measure.latency import bench, call_ms
from optin_cli.measure.runners import EAGER, Execution, prepared

FAST = {"repeats": 2, "seconds": 0.0, "warmup": 1}


@pytest.fixture
def traced(monkeypatch):
    """torch.compile without a C++ compiler: it traces, and runs what it traced. Gives the sizes of the graphs."""
    graphs: list[int] = []

    def backend(module: torch.fx.GraphModule, _: object):
        graphs.append(len(module.graph.nodes))
        return module.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    yield graphs
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("execution", "name"),
    [
        (EAGER, "eager"),
        (Execution(compile=True), "compile"),
        (Execution(cuda_graph=True), "cuda graph"),
        (Execution(True, True), "compile + cuda graph"),
    ],
)
def test_names(execution, name):
    assert execution.name == name


@pytest.mark.parametrize("name", ["bert", pytest.param("deit", marks=pytest.mark.slow)])
def test_a_compiled_model_gives_what_the_model_gives(name, traced):
    models = [shared_model(name), shared_model("electra" if name == "bert" else "vit")]
    inputs = [dummy_inputs(model, 2, 32) for model in models]
    with torch.inference_mode(), prepared(models, inputs, Execution(compile=True)) as runners:
        for model, runner, given in zip(models, runners, inputs, strict=True):
            assert (runner.spec, runner.device) == (model.spec, model.device)
            torch.testing.assert_close(runner.run(given).logits, model.run(given).logits)
    assert len(traced) >= 2
    assert max(traced) > 50  # whole models, not scraps


@pytest.mark.slow
def test_every_shape_is_compiled_however_many_models_there_are(traced):
    """More models of one class than torch would compile by default."""
    model = shared_model("bert")
    several = [model] * 10
    inputs = [dummy_inputs(model, 1 + size, 8) for size in range(10)]
    with torch.inference_mode(), prepared(several, inputs, Execution(compile=True)) as runners:
        for runner, given in zip(runners, inputs, strict=True):
            before = len(traced)
            runner.run(given)
            assert len(traced) > before


def test_a_timing_says_how_it_was_run(traced):
    model = shared_model("bert")
    eager, compiled = (
        bench([model], [2], [8], **FAST, execution=Execution(compile=way))[0] for way in (False, True)
    )
    assert (eager.execution, compiled.execution) == ("eager", "compile")
    assert eager.doubling is not None
    assert compiled.doubling is None
    assert traced


def test_a_cuda_graph_needs_a_gpu():
    with pytest.raises(UsageError, match="a CUDA graph needs a GPU"):
        bench([shared_model("bert")], [1], [8], **FAST, execution=Execution(cuda_graph=True))


def test_the_command_refuses_what_makes_no_sense(tmp_path):
    found = run("bench", saved_model("bert"), "--cuda-graph", "--device", "cpu", code=2)
    assert "leave --cuda-graph out" in " ".join(found.stderr.split())
    found = run("bench", saved_model("bert"), "--table", tmp_path / "t.json", "--compile", code=2)
    assert "a latency table is of models run as they are" in " ".join(found.stderr.split())


class Event:
    """A CUDA event whose time is that of the kernels queued before it: each call below queues seven milliseconds."""

    queued = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at: float | None = None
        self.reached = False

    def record(self) -> None:
        self.at = Event.queued

    def synchronize(self) -> None:
        self.reached = True

    def elapsed_time(self, end: Event) -> float:
        assert end.reached, "asked before the kernels had run"
        return end.at - self.at


def test_a_gpus_time_is_between_two_events(monkeypatch):
    def call() -> None:
        Event.queued += 7.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    assert call_ms(call, torch.device("cuda", 0)) == 7.0


def test_memory_that_runs_out_while_preparing_is_a_usage_error(monkeypatch):
    def full(*_: object):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(latency, "prepared", full)
    with pytest.raises(UsageError, match="batch of 1 at size 8 does not fit"):
        bench([shared_model("bert")], [1], [8], **FAST)
