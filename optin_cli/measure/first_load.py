"""The first load: opening a model from its files, and its first forward, which chooses kernels and fills caches."""

from __future__ import annotations

import time

import torch

from optin_cli.loading.checkpoint import OpenModel, open_model
from optin_cli.measure.inputs import draw


def first_forward(model: OpenModel, batch_size: int, size: int) -> tuple[float | None, float | None]:
    """(milliseconds of opening the model once more from its files, of that copy's first forward after it).

    The libraries are imported and the files as a rule in the system's cache. (None, None) for a model without files,
    such as one that is in memory alone, and for exported files.
    """
    if model.runtime is not None or not model.source.weight_files():
        return None, None
    begin = time.perf_counter()
    again = open_model(
        model.spec,
        device=str(model.device),
        dtype=model.dtype_name,
        family=model.family if model.record is None else None,
        trust_remote_code=model.source.trust_remote_code,
    )
    _settle(again)
    opened = time.perf_counter()
    inputs = draw(again, batch_size, size, 0)
    started = time.perf_counter()
    with torch.inference_mode():
        again.run(inputs)
    _settle(again)
    return (opened - begin) * 1000, (time.perf_counter() - started) * 1000


def _settle(model: OpenModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
