"""torch.export's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optin_cli.errors import InputError, first_line
from optin_cli.runtimes.program import Traced
from optin_cli.runtimes.settings import FLOAT16, FLOAT32, TORCH
from optin_cli.runtimes.targets import Session, Target


class TorchTarget(Target):
    name, suffix, extra = TORCH, ".pt2", ""
    packages = ()
    files = {FLOAT32: "torch/model.pt2", FLOAT16: "torch/model_fp16.pt2"}  # noqa: RUF012

    def write(self, traced: Traced, path: Path, opset: int | None) -> dict[str, Any]:
        torch.export.save(traced.program, path)
        return {}

    def load(self, path: Path, outputs: Sequence[str]) -> Session:
        try:
            module = torch.export.load(path).module()
        except Exception as error:  # whatever is in the archive
            raise InputError(
                f"torch can't open {path}: {first_line(error)}", "run `optin export` again"
            ) from error

        def run(inputs: Mapping[str, Tensor]) -> list[Tensor]:
            found = module(**inputs)
            return [found[name] for name in outputs]

        return run
