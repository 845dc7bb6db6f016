"""Ways to run a model's forward while it is timed: as it is, compiled by torch, or replayed as a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from optin_cli.errors import UsageError, first_line, param
from optin_cli.loading.checkpoint import OpenModel

Inputs = Mapping[str, Tensor]
_WARMUP = 3  # forwards before a graph is recorded: libraries choose kernels and allocate workspaces
_SHAPES = 4  # that each model may be compiled for


@dataclass(frozen=True)
class Execution:
    """The way that every model of a benchmark is run."""

    compile: bool = False
    """By `torch.compile`, for the one shape of its inputs."""
    cuda_graph: bool = False
    """The kernels of a forward are recorded once and replayed together: the CPU launches one thing, not hundreds."""

    @property
    def name(self) -> str:
        """`eager`, `compile`, `cuda graph` or `compile + cuda graph`."""
        return " + ".join(["compile"] * self.compile + ["cuda graph"] * self.cuda_graph) or "eager"

    def check(self, models: Sequence[OpenModel]) -> None:
        """Raise `UsageError` for a CUDA graph of a model that is not on a GPU, and for an exported file."""
        for model in models:
            if model.runtime is not None and (self.compile or self.cuda_graph):
                raise UsageError(
                    f"{model.runtime.name} runs {model.spec}",
                    f"leave {param('compile')} and {param('cuda_graph')} out",
                )
            if self.cuda_graph and model.device.type != "cuda":
                raise UsageError(
                    f"a CUDA graph needs a GPU, and {model.spec} is on the {model.device.type}",
                    f"leave {param('cuda_graph')} out",
                )


EAGER = Execution()


class Runner(Protocol):
    """A model as it is timed."""

    @property
    def spec(self) -> str: ...

    @property
    def device(self) -> torch.device: ...

    def run(self, inputs: Inputs) -> Any:
        """One forward."""


@contextmanager
def prepared(
    models: Sequence[OpenModel], inputs: Sequence[Inputs], execution: Execution
) -> Iterator[list[Runner]]:
    """Within the context, what runs each model on the inputs given here as `execution` says.

    Raises `UsageError` for a model that can't be recorded.
    """
    runners: list[Runner] = [model if model.runtime is None else FileRunner(model) for model in models]
    if execution.compile:
        torch.compiler.reset()  # what was compiled for other settings counts toward torch's limit of shapes
        dynamo: Any = torch._dynamo.config
        with dynamo.patch(recompile_limit=max(dynamo.recompile_limit, _SHAPES * len(models))):
            runners = [CompiledRunner(model) for model in models]
            yield _recorded(runners, inputs, execution)
        return
    yield _recorded(runners, inputs, execution)


def _recorded(runners: list[Runner], inputs: Sequence[Inputs], execution: Execution) -> list[Runner]:
    if not execution.cuda_graph:
        return runners
    return [GraphRunner(runner, given) for runner, given in zip(runners, inputs, strict=True)]


class FileRunner:
    """The exported file of a model, run by its runtime."""

    def __init__(self, model: OpenModel) -> None:
        self.model = model

    @property
    def spec(self) -> str:
        return self.model.spec

    @property
    def device(self) -> torch.device:
        return self.model.device

    def run(self, inputs: Inputs) -> Any:
        return self.model.runtime(**inputs)


class CompiledRunner:
    """A model compiled by torch at its first forward."""

    def __init__(self, model: OpenModel) -> None:
        self.model = model
        self.module = torch.compile(model.task.body(model.module), dynamic=False)

    @property
    def spec(self) -> str:
        return self.model.spec

    @property
    def device(self) -> torch.device:
        return self.model.device

    def run(self, inputs: Inputs) -> Any:
        return self.module(**inputs, **self.model.family.arguments)


class GraphRunner:
    """The kernels of one forward of `runner` on `inputs`, recorded. `run` replays them on those same inputs."""

    def __init__(self, runner: Runner, inputs: Inputs) -> None:
        self.runner = runner
        self.inputs = inputs
        device = runner.device
        with torch.cuda.device(device), torch.inference_mode():
            beside = torch.cuda.Stream(device)
            beside.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(beside):
                for _ in range(_WARMUP):
                    runner.run(inputs)
            torch.cuda.current_stream(device).wait_stream(beside)
            self.graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(self.graph):
                    self.output = runner.run(inputs)
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                raise UsageError(
                    f"{self.spec} can't be recorded as a CUDA graph: {first_line(error)}",
                    f"leave {param('cuda_graph')} out",
                ) from error

    @property
    def spec(self) -> str:
        return self.runner.spec

    @property
    def device(self) -> torch.device:
        return self.runner.device

    def run(self, inputs: Inputs) -> Any:
        """Replay; `inputs` are those that were recorded."""
        self.graph.replay()
        return self.output
