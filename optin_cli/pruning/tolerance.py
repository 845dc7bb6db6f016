"""Tolerance between the outputs of a sliced and of the masked model: the rounding of the dtype that computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""By dtype, as a share of the largest output, or of 1 where all are smaller.

Both models multiply the same numbers, but kernels for another number of units add them in another order. In float32
that costs the sixth digit; half precision rounds what every layer gives, bfloat16 to 8 bits.
"""


def tolerance(dtype: torch.dtype, expected: Sequence[Tensor]) -> float:
    """The largest allowed absolute difference from the outputs `expected` of the masked model, run in `dtype`."""
    largest = max((float(output.abs().max()) for output in expected if output.numel()), default=0.0)
    return TOLERANCES.get(dtype, TOLERANCES[torch.float32]) * max(1.0, largest)
