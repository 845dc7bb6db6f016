"""Export a model to other runtimes."""

from __future__ import annotations

from pathlib import Path

from optin_cli.api.models import Data, Model, Progress, open_model, silent
from optin_cli.data.opening import as_data
from optin_cli.runtimes.checks import open_checks
from optin_cli.runtimes.export import Exported, ExportSettings
from optin_cli.runtimes.export import export as write


def export(
    model: Model,
    output: str | Path,
    data: Data = None,
    *,
    to: str = "onnx",
    fp16: bool = False,
    int8: bool = False,
    max_error: float = 0.1,
    opset: int | None = None,
    cache: bool = False,
    split: str | None = None,
    max_length: int | None = None,
    seed: int = 0,
    force: bool = False,
    on_progress: Progress = silent,
) -> Exported:
    """Write a model, pruned or not, for another runtime, and compare the file with it before it gets its name.

    Args:
        model: see `open_model`; in float32.
        output: a file that ends in `.onnx`, `.xml` (OpenVINO) or `.pt2`; or a directory in the layout of optimum and
            sentence-transformers, to which further files of the same model are added.
        data: see `score`: what the file is compared on, and int8 chosen by. By default `builtin:prose` for models of
            text, and noise for others.
        to: `onnx`, `openvino` or `torch` (torch.export).
        fp16: weights and activations in float16; inputs and outputs stay float32.
        int8: products in int8, weights for each channel. Layers stay in float32 until outputs move by `max_error`.
        max_error: root of the mean squared change of the outputs, as a share of their spread over the data.
        opset: operator set of ONNX; by default torch's.
        cache: of a decoder, with keys and values as inputs and outputs, to generate token by token; for ONNX.
        split: of the data; by default `train`.
        max_length: tokens of a text at most.
        seed: of the examples drawn.
        force: replace what was exported to `output` before.
        on_progress: called with (steps done, all steps, what is being done).

    Returns:
        The file's `path`, its size in `bytes`, and its `facts`: `deviation` from the model in torch, of int8 the
        `agreement` with it and the `float_layers`.

    Raises:
        InputError: for a model that can't be exported: the operator and the module it is in are named.
        UsageError: for something else at `output`, and where a package is missing.

    Example:
        >>> made = optin.export(model, folder / "small.pt2", batches, to="torch")
        >>> made.facts["deviation"] < 1e-4
        True
    """
    opened = open_model(model)
    settings = ExportSettings(to, fp16, int8, max_error, opset, cache)
    rows = None if data is None else as_data(data, split)
    return write(
        opened, settings, Path(output), lambda plain: open_checks(plain, rows, seed, max_length), force=force,
        on_progress=on_progress,
    )  # fmt: skip
