"""Faster matrix products where their rounding does not matter: TF32 on a GPU, bfloat16 on a CPU with AMX.

Operands are rounded, sums stay float32. Meant for products of small changes and of random probes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def reduced_products(device: torch.device, enabled: bool = True) -> Iterator[None]:
    """Within the context, float32 matrix products on `device` may round their operands, where that is faster."""
    backends: Any = torch.backends
    backend: Any = backends.cuda.matmul if device.type == "cuda" else getattr(backends.mkldnn, "matmul", None)
    # older versions of torch have no switch of this name; without AMX bfloat16 is the slower one
    fast = device.type == "cuda" or bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
    if not (enabled and fast and hasattr(backend, "fp32_precision")):
        yield
        return
    before = backend.fp32_precision
    backend.fp32_precision = "tf32" if device.type == "cuda" else "bf16"
    try:
        yield
    finally:
        backend.fp32_precision = before
