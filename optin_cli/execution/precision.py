"""Convolutions in float32 where a comparison needs every digit: cuDNN rounds their operands to TF32 by default."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
