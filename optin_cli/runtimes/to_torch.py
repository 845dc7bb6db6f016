"""torch.export's files."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optin_cli.errors import InputError, first_line
from optin_cli.runtimes.program import Traced
from optin_cli.runtimes.settings import FLOAT16, FLOAT32, TORCH
from optin_cli.runtimes.targets import Session, Target, quiet


class TorchTarget(Target):
    name, suffix, extra = TORCH, ".pt2", ""
    packages = ()
    files = {FLOAT32: "torch/model.pt2", FLOAT16: "torch/model_fp16.pt2"}  # noqa: RUF012

    def write(self, traced: Traced, path: Path, opset: int | None) -> dict[str, Any]:
        image = io.BytesIO()  # on a full disk torch's own writer ends the process
        torch.export.save(traced.program, image)
        path.write_bytes(image.getbuffer())
        return {}

    def load(self, path: Path, outputs: Sequence[str]) -> Session:
        try:
            with quiet():  # it logs the traceback of what it raises
                module = torch.export.load(io.BytesIO(path.read_bytes())).module()
        except Exception as error:  # whatever is in the archive
            raise InputError(
                f"torch can't open {path}: {first_line(error)}", "run `optin export` again"
            ) from error

        def run(inputs: Mapping[str, Tensor]) -> list[Tensor]:
            found = module(**inputs)
            return [found[name] for name in outputs]

        return run
