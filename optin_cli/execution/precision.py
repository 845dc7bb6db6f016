"""Switch how torch rounds float32: exact convolutions for comparisons, faster products where rounding is harmless.

cuDNN rounds the operands of convolutions to TF32 by default, which is too coarse for a comparison of two models.
Products of small changes and of random probes can be rounded: TF32 on a GPU, bfloat16 on a CPU with AMX. Operands
are rounded, sums stay float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Within the context, float32 convolutions on a GPU keep all digits of their operands.

    TF32 keeps 10 bits of a mantissa. A masked and a sliced CNN then differ in the third digit, because cuDNN takes
    other kernels for other numbers of channels.
    """
    cudnn: Any = torch.backends.cudnn
    # older versions of torch have one switch for all of cuDNN
    switch, name, exact = (
        (cudnn.conv, "fp32_precision", "ieee") if hasattr(cudnn, "conv") else (cudnn, "allow_tf32", False)
    )
    before = getattr(switch, name)
    setattr(switch, name, exact)
    try:
        yield
    finally:
        setattr(switch, name, before)


@contextmanager
def reduced_products(device: torch.device, enabled: bool = True) -> Iterator[None]:
    """Within the context, float32 matrix products on `device` may round their operands, where that is faster."""
    fast = device.type == "cuda" or rounds_on_cpu(device)
    with _products(device, ("tf32" if device.type == "cuda" else "bf16") if enabled and fast else None):
        yield


def rounds_on_cpu(device: torch.device) -> bool:
    """Whether `device` is a CPU on which `reduced_products` round: without AMX bfloat16 is the slower one."""
    return device.type == "cpu" and bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Within the context, float32 matrix products on `device` keep all digits, whatever the user allows elsewhere."""
    with _products(device, "ieee"):
        yield


@contextmanager
def _products(device: torch.device, precision: str | None) -> Iterator[None]:
    """Set how matrix products of float32 round their operands; None leaves it."""
    backends: Any = torch.backends
    backend: Any = backends.cuda.matmul if device.type == "cuda" else getattr(backends.mkldnn, "matmul", None)
    if hasattr(backend, "fp32_precision"):
        before: str = backend.fp32_precision
        change: Callable[[str], None] = partial(setattr, backend, "fp32_precision")
    else:  # older versions of torch have one switch for all devices, and round nothing by default
        before, change = torch.get_float32_matmul_precision(), torch.set_float32_matmul_precision
        precision = "highest" if precision == "ieee" else None
    if precision is None:
        yield
        return
    change(precision)
    try:
        yield
    finally:
        change(before)
