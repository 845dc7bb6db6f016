"""Dynamic int8 with little loss: weights of 7 bits for each channel, and layers in float32 where int8 costs most.

onnxruntime multiplies unsigned activations with signed weights. Without VNNI instructions its kernels add two products
in 16 bits, which saturates at weights of 8 bits: 2 * 255 * 127 > 2^15. Weights within +-64 can't (reduced range), and
give the same on every CPU. Activations are quantised for a whole tensor as it comes, from its smallest to its largest
number: a layer whose inputs have a few large numbers loses the small ones. What that costs is measured in torch, on
calibration data, one layer at a time; errors of single layers add up nearly, since they are independent.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optin_cli.errors import InputError
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.runtimes.targets import need, quiet

WEIGHT_BITS = 7
_KINDS = {"MatMul": 1, "Gemm": 1, "Gather": 0}
"""Operator -> which of its inputs is the weight."""
_SMALLEST = (
    4096  # weights of a table: below that it is one of positions or types, which costs and saves nothing
)
SCOPES = "pkg.torch.onnx.name_scopes"
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Layer:
    """A product with constant weights, or a table of embeddings, in an ONNX file."""

    path: str
    """Of the module that it is from."""
    node: str
    weights: int


@dataclass(frozen=True)
class Quantised:
    """The layers that stay in float32, and the error that int8 makes by itself at each layer."""

    float_layers: list[str]
    errors: dict[str, float]
    """Layer -> relative squared error of the model's outputs when it alone is int8."""


def layers_in(path: Path) -> list[Layer]:
    """The layers of an ONNX file that can be int8."""
    onnx = need("onnx", "onnx")
    graph = onnx.load(path, load_external_data=False).graph
    sizes = {
        one.name: math.prod(one.dims) for one in graph.initializer if one.data_type == onnx.TensorProto.FLOAT
    }
    found = []
    for node in graph.node:
        weight = node.input[_KINDS[node.op_type]] if node.op_type in _KINDS else ""
        if weight in sizes and (node.op_type != "Gather" or sizes[weight] >= _SMALLEST):
            found.append(Layer(_module_of(node), node.name, sizes[weight]))
    return found


def _module_of(node: Any) -> str:
    """The path of the module that torch's exporter notes on a node."""
    scopes = next((one.value for one in node.metadata_props if one.key == SCOPES), "[]")
    named = [scope for scope in ast.literal_eval(scopes)[:-1] if scope.startswith("body.")]
    return named[-1].removeprefix("body.") if named else node.name


def quantise(source: Path, path: Path, layers: Sequence[Layer], float_layers: Sequence[str]) -> None:
    """Write the float32 file `source` with all `layers` in int8 but `float_layers`."""
    tool: Any = need("onnxruntime.quantization", "onnx")
    chosen = [layer.node for layer in layers if layer.path not in float_layers]
    chosen += [f"{node}_MatMul" for node in chosen]  # as the tool renames a Gemm
    with quiet():
        tool.quantize_dynamic(
            source, path, op_types_to_quantize=list(_KINDS), per_channel=True, reduce_range=True,
            weight_type=tool.QuantType.QInt8, nodes_to_quantize=chosen or ["none"],  # an empty list means all
            extra_options={"MatMulConstBOnly": True},
        )  # fmt: skip


def check_worthwhile(model: OpenModel, layers: Sequence[Layer]) -> None:
    """Raise `InputError` for a model of convolutions: onnxruntime's dynamic int8 is for products."""
    body: Any = model.task.body(model.module)
    convolved = sum(p.weight.numel() for p in body.modules() if isinstance(p, nn.Conv1d | nn.Conv2d))
    if sum(layer.weights for layer in layers) < convolved:
        raise InputError(
            f"most weights of {model.spec} are in convolutions, and dynamic int8 is for products",
            "export it in float32 or float16",
        )


@dataclass(frozen=True)
class Reference:
    """What a model gives in float32 on some batches: what quantised ones are compared with."""

    batches: Sequence[Inputs]
    outputs: list[Tensor]
    """(examples, rows, classes)."""
    weights: list[Tensor]
    """(examples, rows): 0 of padding."""
    spread: float
    """The sum of squared distances of rows from their mean: what tells one example from another."""

    def error(self, found: Sequence[Tensor]) -> float:
        """Squared error of outputs for the same batches, relative to the spread."""
        squares = sum(
            float(((a - b).square().sum(-1) * w).sum())
            for a, b, w in zip(found, self.outputs, self.weights, strict=True)
        )
        return squares / max(self.spread, 1e-30)


@torch.inference_mode()
def reference(model: OpenModel, batches: Sequence[Inputs]) -> Reference:
    outputs = _outputs(model, batches)
    weights = [model.task.row_weights(b).expand(w.shape[:2]) for b, w in zip(batches, outputs, strict=True)]
    rows = torch.cat(
        [one[w > 0] for one, w in zip(outputs, weights, strict=True)]
    ).double()  # (rows, classes)
    return Reference(batches, outputs, weights, float((rows - rows.mean(0)).square().sum()))


def _outputs(model: OpenModel, batches: Sequence[Inputs]) -> list[Tensor]:
    return [model.task.output(model.module, {**one, **model.family.arguments}) for one in batches]


@torch.inference_mode()
def layer_errors(model: OpenModel, layers: Sequence[Layer], known: Reference) -> dict[str, float]:
    """Layer -> relative squared error of the model's outputs when it alone is int8."""
    body: Any = model.task.body(model.module)
    errors = {}
    for path in dict.fromkeys(layer.path for layer in layers):
        part = body.get_submodule(path) if _has(body, path) else None
        if _axis(part) is not None:
            with int8(part):
                errors[path] = known.error(_outputs(model, known.batches))
    return errors


def costliest(layers: Sequence[Layer], errors: dict[str, float]) -> list[str]:
    """Layers, those first that save most error for each weight that stays in float32."""
    sizes = {layer.path: layer.weights for layer in layers}
    return sorted(errors, key=lambda path: errors[path] / sizes[path], reverse=True)


def choose(
    model: OpenModel, layers: Sequence[Layer], batches: Sequence[Inputs], max_error: float
) -> Quantised:
    """The layers to leave in float32, so that the relative error of the outputs stays below `max_error`, in estimate.

    Those are left that save most error for each weight.
    """
    errors = layer_errors(model, layers, reference(model, batches))
    left, chosen = sum(errors.values()), []
    for path in costliest(layers, errors):
        if left <= max_error**2:
            break
        left -= errors[path]
        chosen.append(path)
    return Quantised(chosen, errors)


def fewest(most: int, allowed: float, error_of: Callable[[int], float]) -> int:
    """The least number of layers in float32 with which a file's error is `allowed`, by bisection; `most` at most."""
    if error_of(0) <= allowed:
        return 0
    low, high = 0, most  # `low` are too few
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if error_of(middle) <= allowed else (middle, high)
    return high


def _has(body: nn.Module, path: str) -> bool:
    try:
        body.get_submodule(path)
    except AttributeError:
        return False
    return True


def _axis(part: Any) -> int | None:
    """The axis of a layer's weight that is summed over; -1 of a table: one scale for all; None of the rest."""
    if isinstance(part, nn.Linear):
        return 1
    if isinstance(part, nn.Embedding):
        return -1
    return 0 if type(part).__name__ == "Conv1D" else None


@contextmanager
def int8(part: Any) -> Iterator[None]:
    """Within the context, a layer computes as onnxruntime does in int8."""
    whole, axis = part.weight, _axis(part)
    assert axis is not None

    def quantised(_: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rounded_tensor(given[0]), *given[1:])

    handle = None if axis < 0 else part.register_forward_pre_hook(quantised)
    rounded = rounded_weights(whole.detach(), axis) if axis >= 0 else rounded_tensor(whole.detach())
    part.weight = nn.Parameter(rounded, requires_grad=False)
    try:
        yield
    finally:
        part.weight = whole
        if handle is not None:
            handle.remove()


def rounded_weights(weight: Tensor, along: int) -> Tensor:
    """Symmetric: each row or column `along` an axis by its largest number."""
    if not weight.numel():
        return weight
    scale = weight.abs().amax(along, keepdim=True).clamp(min=1e-30) / 2 ** (WEIGHT_BITS - 1)
    return (weight / scale).round() * scale


def rounded_tensor(x: Tensor) -> Tensor:
    """Asymmetric, of 8 bits, from the smallest to the largest number, zero included: DynamicQuantizeLinear."""
    if not x.numel():
        return x
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = ((high - low) / 255).clamp(min=1e-30)
    zero = (-low / scale).round()
    return ((x / scale + zero).round().clamp(0, 255) - zero) * scale
