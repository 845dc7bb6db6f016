"""OpenVINO's IR: an .xml file with its weights in a .bin file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optin_cli.errors import InputError, first_line, param
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.runtimes import quantise
from optin_cli.runtimes.checks import Checks
from optin_cli.runtimes.program import Traced, module_path
from optin_cli.runtimes.settings import FLOAT16, FLOAT32, INT8, OPENVINO
from optin_cli.runtimes.targets import Runtime, Session, Target, need, quiet, runtime_name

_PRODUCTS = ("MatMul", "Convolution")


class OpenVinoTarget(Target):
    name, suffix, extra = OPENVINO, ".xml", "openvino"
    packages = ("openvino",)
    int8_packages = ("nncf",)
    files = {  # noqa: RUF012 - the names that optimum and sentence-transformers look for
        FLOAT32: "openvino/openvino_model.xml",
        FLOAT16: "openvino/openvino_model_fp16.xml",
        INT8: "openvino/openvino_model_qint8_quantized.xml",
    }

    def write(self, traced: Traced, path: Path, opset: int | None) -> dict[str, Any]:
        _save(self._converted(traced), path, half=traced.module.dtype == torch.float16)
        return {}

    def write_int8(
        self,
        model: OpenModel,
        traced: Traced,
        path: Path,
        checks: Checks,
        max_error: float,
        opset: int | None,
    ) -> dict[str, Any]:
        """Quantised after training by NNCF: ranges of activations are measured on the examples, outliers of them moved
        into weights (SmoothQuant), weights have 7 bits.

        Layers stay in float32 in the order of what int8 costs them in torch, until the file itself moves outputs by no
        more than `max_error`.
        """
        openvino = need("openvino", self.extra)
        whole = self._converted(traced)
        layers = _layers(whole, traced)
        known = quantise.reference(model, checks.calibration)
        order = quantise.costliest(layers, quantise.layer_errors(model, layers, known))
        attentive = any(site.kind == "heads" for site in model.anatomy)
        made: dict[int, tuple[Any, float]] = {}

        def error_of(count: int) -> float:
            nodes = [layer.node for layer in layers if layer.path in order[:count]]
            found = self._quantised(whole, traced, known.batches, nodes, attentive)
            session = self._session(openvino.Core().compile_model(found, "CPU", _settings()), traced.outputs)
            runtime = Runtime(
                runtime_name(self), path, INT8, tuple(traced.inputs), tuple(traced.outputs), session
            )
            error = known.error([replace(model, runtime=runtime).output(one) for one in known.batches])
            made[count] = found, error
            return error

        count = quantise.fewest(len(order), max_error**2, error_of)
        if count not in made:
            error_of(count)
        found, error = made[count]
        if error > max_error**2:
            raise InputError(
                f"int8 moves outputs by {error**0.5:.2g} of their spread with every layer in float32",
                f"allow more ({param('max_error')}), or export it in float32",
            )
        _save(found, path)
        return {"weight_bits": quantise.WEIGHT_BITS, "float_layers": order[:count], "error": error**0.5}

    def _quantised(
        self,
        whole: Any,
        traced: Traced,
        batches: Sequence[Mapping[str, Tensor]],
        float_nodes: Sequence[str],
        attentive: bool,
    ) -> Any:
        nncf = need("nncf", self.extra)
        examples = [{name: one[name].cpu().numpy() for name in traced.inputs} for one in batches]
        with quiet():
            return nncf.quantize(
                whole, nncf.Dataset(examples), subset_size=len(examples),
                preset=nncf.QuantizationPreset.MIXED, target_device=nncf.TargetDevice.CPU,
                model_type=nncf.ModelType.TRANSFORMER if attentive else None,
                ignored_scope=nncf.IgnoredScope(names=list(float_nodes)),
                advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE),
            )  # fmt: skip

    def _converted(self, traced: Traced) -> Any:
        openvino = need("openvino", self.extra)
        try:
            model = openvino.convert_model(traced.program)
        except Exception as error:  # its exceptions have no common base
            raise InputError(
                f"OpenVINO can't convert this model: {first_line(error)}",
                f"run it with torch, or export it with {param('to', 'torch')}",
            ) from error
        for port, name in zip(model.inputs, traced.inputs, strict=True):
            port.get_tensor().set_names({name})
        for port, name in zip(model.outputs, traced.outputs, strict=True):
            port.get_tensor().set_names({name})
        return model

    def load(self, path: Path, outputs: Sequence[str]) -> Session:
        openvino = need("openvino", self.extra)
        try:
            compiled = openvino.Core().compile_model(path, "CPU", _settings())
        except Exception as error:  # its exceptions have no common base
            raise InputError(
                f"OpenVINO can't open {path}: {first_line(error)}", "run `optin export` again"
            ) from error

        return self._session(compiled, outputs)

    def _session(self, compiled: Any, outputs: Sequence[str]) -> Session:
        def run(inputs: Mapping[str, Tensor]) -> list[Tensor]:
            found = compiled({name: value.cpu().numpy() for name, value in inputs.items()})
            return [torch.from_numpy(found[name].copy()) for name in outputs]

        return run


def _save(converted: Any, path: Path, half: bool = False) -> None:
    try:
        need("openvino", OpenVinoTarget.extra).save_model(converted, path, compress_to_fp16=half)
    except Exception as error:  # its exceptions have no common base
        raise InputError(
            f"OpenVINO can't write {path}: {first_line(error)}", "check the disk and run it again"
        ) from error


def _settings() -> dict[str, Any]:
    return {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}


def _layers(converted: Any, traced: Traced) -> list[quantise.Layer]:
    """The products with constant weights. OpenVINO's nodes are named after those of the traced program."""
    paths = {node.name: module_path(node) for node in traced.program.graph.nodes}
    parts = dict(traced.module.body.named_modules())
    found = []
    for node in converted.get_ops():
        name = node.get_friendly_name()
        path = paths.get(name.partition("/")[0], "")
        weight = getattr(parts.get(path), "weight", None)
        if node.get_type_name() in _PRODUCTS and isinstance(weight, Tensor):
            found.append(quantise.Layer(path, name, weight.numel()))
    return found
