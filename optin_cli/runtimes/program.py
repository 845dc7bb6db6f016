"""A model as a program of tensors, traced: every export begins with it."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optin_cli.errors import InputError, first_line
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.runtimes.empty import remove_empty

Inputs = Mapping[str, Tensor]
SINGLE = "output"
"""Names the output of a model that gives one tensor, without a name."""
BATCH, TOKENS = "batch", "tokens"
_DECODER = "decoder_"


class Program(nn.Module):
    """The part of a model that its task reads: named tensors in, a dictionary of tensors out.

    Numbers outside are float32, whatever the model computes in.
    """

    def __init__(self, model: OpenModel, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.body: Any = model.task.body(model.module)
        self.arguments, self.outputs, self.dtype = dict(model.family.arguments), list(outputs), model.dtype
        either = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(name, either) for name in ("self", *inputs)]

        def forward(self: Program, *args: Tensor, **kwargs: Tensor) -> dict[str, Tensor]:
            return self.run({**dict(zip(inputs, args, strict=False)), **kwargs})

        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        self.__class__ = type(
            "Program", (type(self),), {"forward": forward}
        )  # torch asks for the names of inputs

    def run(self, inputs: Inputs) -> dict[str, Tensor]:
        given = {name: as_dtype(value, self.dtype) for name, value in inputs.items()}
        result = self.body(**given, **self.arguments)
        named = (
            {SINGLE: result}
            if isinstance(result, Tensor)
            else {name: getattr(result, name) for name in self.outputs}
        )
        return {name: as_dtype(value, torch.float32) for name, value in named.items()}


def as_dtype(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers in `dtype`; indices and masks as they are."""
    return value.to(dtype) if value.is_floating_point() and value.dtype != dtype else value


class _Reads:
    """What a model gives, noting which tensors are read of it."""

    def __init__(self, result: Any) -> None:
        self.result, self.names = result, {}  # type: Any, dict[str, None]

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.result, name)
        if isinstance(value, Tensor):
            self.names[name] = None
        return value


def outputs_read(model: OpenModel, inputs: Inputs) -> list[str]:
    """The names of the outputs that the model's task reads."""
    seen: list[str] = []
    body = model.task.body(model.module)

    def watched(**given: Any) -> Any:
        result = body(**given)
        if isinstance(result, Tensor):
            seen.append(SINGLE)
            return result
        reads.append(_Reads(result))
        return reads[0]

    reads: list[_Reads] = []
    with torch.no_grad():
        given = {name: as_dtype(value, model.dtype) for name, value in inputs.items()}
        model.task.full_output(watched, {**given, **model.family.arguments})
    return seen or list(reads[0].names)


@dataclass(frozen=True)
class Traced:
    """A program that torch has traced, with open sizes."""

    program: Any
    """torch.export.ExportedProgram."""
    module: Program
    inputs: dict[str, Tensor]
    """The batch that it was traced on."""
    outputs: list[str]
    axes: dict[str, dict[int, str]]
    """Input -> axis -> the name of its open size."""
    file_inputs: list[str]
    """What files name the inputs, in their order."""


def open_axes(inputs: Inputs) -> dict[str, dict[int, str]]:
    """The sizes that a file leaves open: the batch, and of token ids and masks the length."""
    axes = {}
    for name, value in inputs.items():
        axes[name] = {0: BATCH}
        if value.dim() == 2 and not value.is_floating_point():
            axes[name][1] = f"{_DECODER if name.startswith(_DECODER) else ''}{TOKENS}"
    return axes


def trace(model: OpenModel, inputs: Inputs) -> Traced:
    """Trace `model` on a batch of at least two examples and tokens.

    Raises `InputError` for a model that torch can't trace, naming the module.
    """
    outputs = outputs_read(model, inputs)
    module, axes = Program(model, list(inputs), outputs), open_axes(inputs)
    program = export_program(model, module, inputs, axes)
    return Traced(program, module, dict(inputs), outputs, axes, list(inputs))


def export_program(
    model: OpenModel, module: Program, inputs: Inputs, axes: Mapping[str, Mapping[int, str]]
) -> Any:
    """A torch.export.ExportedProgram without what sums over nothing, and without the places in the source code, which
    would tell every reader of a file where things lie on this machine. Raises `InputError`, naming the module."""
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {name: dict.fromkeys(named, dynamic) for name, named in axes.items()}
    try:
        with torch.no_grad():
            program = torch.export.export(module, (), dict(inputs), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch has many, and none for this alone
        raise InputError(
            f"{model.spec} can't be traced{_where(error, module)}: {first_line(error)}", _way_out(model)
        ) from error
    remove_empty(program)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def _way_out(model: OpenModel) -> str:
    if model.merges:
        return "it merges tokens: export a model that was pruned without --tokens"
    return "run it with torch, or export another of its parts"


def _where(error: BaseException, module: Program) -> str:
    """` in encoder.layer.0 (BertLayer)`: the innermost module that ran when an error was raised."""
    names = {id(part): path for path, part in module.body.named_modules()}
    found = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        part = frame.f_locals.get("self")
        if id(part) in names and names[id(part)]:
            found = f" in {names[id(part)]} ({type(part).__name__})"
    return found


def module_path(node: Any) -> str:
    """The path, within the model, of the module that a node of a traced program comes from."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]).removeprefix("body.") if stack else ""


def origin(program: Any, message: str) -> str:
    """` in encoder.layer.0 (BertLayer): aten.sort`: the module and the operator that a converter's message names."""
    operators = re.findall(r"op='\w+\.(\w+)'|aten[.:]+(\w+)", message)
    stems = {one or other for one, other in operators}
    names = set(re.findall(r"%(\w+)", message))
    for node in program.graph.nodes:
        kind = str(node.target).split(".")
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        named = node.name in names or (len(kind) > 1 and any(kind[1].endswith(stem) for stem in stems))
        if named and stack:
            cls = stack[-1][1]
            name = getattr(cls, "__name__", str(cls)).rpartition(".")[2]
            return f" in {module_path(node)} ({name}): {'.'.join(kind[:2])}"
    return ""
