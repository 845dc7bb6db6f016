"""The attention backend of a model: what its library calls, and the kernel that torch takes for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from optin_cli.loading.checkpoint import OpenModel
from optin_cli.structure.anatomy import HEADS

EAGER, SDPA = "eager", "sdpa"
_KERNELS = {
    "flash": "flash",
    "efficient": "memory efficient",
    "cudnn": "cuDNN",
    "overrideable": "of the device",
}
"""Part of the name of a kernel behind `scaled_dot_product_attention` -> what it is called."""


def attention_backend(model: OpenModel, inputs: Mapping[str, Tensor]) -> str:
    """`sdpa (flash)` and so on where the model calls torch's `scaled_dot_product_attention`, with the kernel that torch
    picks for these inputs; `sdpa (math)` where that multiplies matrices one after the other.

    Otherwise what transformers calls its backend (`eager`, `flash_attention_2`), and '' for a model without heads.
    One forward is run. '' also of an exported file: its runtime does not say.
    """
    if model.runtime is not None:
        return ""
    with torch.no_grad(), _Calls() as calls, _Kernels() as kernels:
        model.run(inputs)
    if calls.seen:
        return f"{SDPA} ({' and '.join(sorted(kernels.seen)) or 'math'})"
    if not any(site.kind == HEADS for site in model.anatomy):
        return ""
    return getattr(getattr(model.module, "config", None), "_attn_implementation", None) or EAGER


class _Calls(TorchFunctionMode):
    """Whether `scaled_dot_product_attention` is called."""

    seen = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Iterable[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is functional.scaled_dot_product_attention:
            self.seen = True
        return func(*args, **(kwargs or {}))


class _Kernels(TorchDispatchMode):
    """The kernels that it comes to."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Iterable[Any] = (), kwargs: Any = None) -> Any:
        name = str(func)
        if "scaled_dot_product" in name:
            self.seen |= {words for part, words in _KERNELS.items() if part in name}
        return func(*args, **(kwargs or {}))
