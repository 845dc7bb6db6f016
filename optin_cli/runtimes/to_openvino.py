"""OpenVINO's IR: an .xml file with its weights in a .bin file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optin_cli.errors import InputError, first_line, param
from optin_cli.runtimes.program import Traced
from optin_cli.runtimes.settings import FLOAT16, FLOAT32, OPENVINO
from optin_cli.runtimes.targets import Session, Target, need


class OpenVinoTarget(Target):
    name, suffix, extra = OPENVINO, ".xml", "openvino"
    packages = ("openvino",)
    files = {  # noqa: RUF012 - the names that optimum and sentence-transformers look for
        FLOAT32: "openvino/openvino_model.xml",
        FLOAT16: "openvino/openvino_model_fp16.xml",
    }

    def write(self, traced: Traced, path: Path, opset: int | None) -> dict[str, Any]:
        openvino = need("openvino", self.extra)
        converted, half = self._converted(traced), traced.module.dtype == torch.float16
        try:
            openvino.save_model(converted, path, compress_to_fp16=half)
        except Exception as error:  # its exceptions have no common base
            raise InputError(
                f"OpenVINO can't write {path}: {first_line(error)}", "check the disk and run it again"
            ) from error
        return {}

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
        settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
        try:
            compiled = openvino.Core().compile_model(path, "CPU", settings)
        except Exception as error:  # its exceptions have no common base
            raise InputError(
                f"OpenVINO can't open {path}: {first_line(error)}", "run `optin export` again"
            ) from error

        def run(inputs: Mapping[str, Tensor]) -> list[Tensor]:
            found = compiled({name: value.cpu().numpy() for name, value in inputs.items()})
            return [torch.from_numpy(found[name].copy()) for name in outputs]

        return run
