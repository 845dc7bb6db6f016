"""ONNX files, through torch.onnx's exporter, and onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optin_cli.errors import InputError, UsageError, first_line, param
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.runtimes import quantise
from optin_cli.runtimes.checks import Checks
from optin_cli.runtimes.program import Traced, origin
from optin_cli.runtimes.settings import FLOAT16, FLOAT32, INT8, ONNX
from optin_cli.runtimes.targets import Session, Target, need, parts_of, quiet

_OLDEST, _NEWEST = 18, 23
"""Opsets that torch's exporter writes."""


class OnnxTarget(Target):
    name, suffix, extra = ONNX, ".onnx", "onnx"
    packages = ("onnx", "onnxscript", "onnxruntime")
    files = {  # noqa: RUF012 - the names that optimum and sentence-transformers look for
        FLOAT32: "onnx/model.onnx",
        FLOAT16: "onnx/model_fp16.onnx",
        INT8: "onnx/model_qint8_avx512_vnni.onnx",
    }

    def write(self, traced: Traced, path: Path, opset: int | None) -> dict[str, Any]:
        onnx = need("onnx", self.extra)
        if opset is not None and not _OLDEST <= opset <= _NEWEST:
            raise UsageError(param("opset", opset), f"torch writes the operator sets {_OLDEST} to {_NEWEST}")
        try:
            with quiet():
                program = torch.onnx.export(
                    traced.program, (), kwargs=dict(traced.inputs), input_names=traced.file_inputs,
                    output_names=traced.outputs, dynamic_shapes=traced.axes, opset_version=opset, dynamo=True,
                    verbose=False, custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
                )  # fmt: skip
                assert program is not None
                program.save(path)
        except torch.onnx.errors.OnnxExporterError as error:
            cause = _deepest(error)
            raise InputError(
                f"ONNX has no operator for this model{origin(traced.program, str(cause))}: {first_line(cause)}",
                f"run it with torch, or export it with {param('to', 'torch')}",
            ) from error
        model = onnx.load(path, load_external_data=False)
        del model.graph.value_info[:]  # the int8 tool turns weights, and trips over the shapes they had
        _forget_sources(model)
        onnx.save(model, path)
        (version,) = (one.version for one in model.opset_import if one.domain == "")
        return {"opset": version}

    def write_int8(
        self,
        model: OpenModel,
        traced: Traced,
        path: Path,
        checks: Checks,
        max_error: float,
        opset: int | None,
    ) -> dict[str, Any]:
        whole = path.with_name(f"float32-{path.name}")
        try:
            facts = self.write(traced, whole, opset)
            layers = quantise.layers_in(whole)
            quantise.check_worthwhile(model, layers)
            found = quantise.choose(model, layers, checks.calibration, max_error)
            quantise.quantise(whole, path, layers, found.float_layers)
        finally:
            for part in parts_of(whole):
                part.unlink(missing_ok=True)
        return {
            **facts,
            "weight_bits": quantise.WEIGHT_BITS,
            "float_layers": found.float_layers,
            "layer_errors": found.errors,
        }

    def load(self, path: Path, outputs: Sequence[str]) -> Session:
        runtime = need("onnxruntime", self.extra)
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
        try:
            session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its classes are of C++, one for each status
            raise InputError(
                f"onnxruntime can't open {path}: {first_line(error)}", "run `optin export` again"
            ) from error

        def run(inputs: Mapping[str, Tensor]) -> list[Tensor]:
            given = {name: value.cpu().numpy() for name, value in inputs.items()}
            return [torch.from_numpy(found) for found in session.run(list(outputs), given)]

        return run


def _stable_sort(values: Any, dim: int = -1, descending: bool = False, stable: bool | None = None) -> Any:
    """`aten.sort.stable`, which torch does not translate and merging tokens needs, as ONNX's TopK of all values: of
    equal ones it takes the earlier first."""
    from onnxscript import opset18 as op

    count = op.Reshape(
        op.Gather(op.Shape(values), op.Constant(value_ints=[dim])), op.Constant(value_ints=[1])
    )
    return op.TopK(values, count, axis=dim, largest=int(descending), sorted=1)


def _forget_sources(model: Any) -> None:
    """Of what the exporter notes on each node, keep the names of the modules alone: the rest is places in the source
    code on this machine, and of a small model as large as its weights."""
    for node in (*model.graph.node, *(node for function in model.functions for node in function.node)):
        kept = [note for note in node.metadata_props if note.key == quantise.SCOPES]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)


def _deepest(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
