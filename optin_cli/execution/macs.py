"""Multiply-accumulates of a whole forward, counted from the shapes of its operations.

`Anatomy.macs` models the prunable part alone; these counts include embeddings, heads and whatever else runs. The
formulas are ours, so a count depends neither on the attention kernel that torch picks nor on which formulas the
installed torch knows (before 2.15 its own counter skips attention on a CPU). An operation that multiplies but
has no formula here is named in a warning: the count is then too low.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._higher_order_ops.flex_attention import flex_attention
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

from optin_cli.loading.checkpoint import OpenModel
from optin_cli.structure.hidden_states import as_rows, hidden_of

log = logging.getLogger(__name__)


def count_macs(model: OpenModel, inputs: Mapping[str, Tensor]) -> int:
    """MACs of one forward on the whole batch; warns of operations that it can't count."""
    with torch.no_grad(), MacCounter() as counter:
        model.run(inputs)
    counter.warn_uncounted()
    return counter.total


class MacCounter(TorchDispatchMode):
    """Counts the MACs of everything that runs inside `with MacCounter() as counter:`.

    A product [m, k] x [k, n] is m k n MACs; a convolution is its kernel's size times its outputs; attention is
    queries x keys x (key width + value width) for each query head, causal or not (docs/method.md, section 4).
    Element-wise work, norms, softmax, pooling and look-ups count nothing.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.by_operation: Counter[str] = Counter()
        """MACs by the operation's name, for example `aten.mm`."""
        self.uncounted: Counter[str] = Counter()
        """Calls of operations that may multiply and have no formula."""

    @property
    def total(self) -> int:
        """All MACs counted so far."""
        return self.by_operation.total()

    def warn_uncounted(self) -> None:
        """Name the operations without a formula, if any ran."""
        if self.uncounted:
            log.warning("MACs are too low: they leave out %s", ", ".join(sorted(self.uncounted)))

    def __enter__(self) -> MacCounter:
        # compiled code, flex attention above all, runs as it was written: inside fused kernels nothing is seen
        self._stance = torch.compiler.set_stance("force_eager")
        self._stance.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stance.__exit__(*error)

    @contextmanager
    def _again(self) -> Iterator[None]:
        """Count inside an operation, too. torch leaves this mode while `__torch_dispatch__` runs."""
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            formula = FORMULAS.get(func.name())
            if formula is None:  # its body's operations come here one by one
                with self._again():
                    return func(*args, **kwargs)
            self.by_operation[func.name()] += formula(args, None)
            return func(*args, **kwargs)
        name = str(func.overloadpacket).removesuffix("_")  # in place is the same work
        formula = FORMULAS.get(name)
        if formula is None:
            with self._again():
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
            if _may_multiply(func.namespace, name):
                self.uncounted[name] += 1
        result = func(*args, **kwargs)
        if formula is not None:
            self.by_operation[name] += formula(args, result)
        return result


Formula = Callable[[Any, Any], int]
"""(positional arguments, result) -> MACs"""


def _matmul(first: int) -> Formula:
    """Of `args[first]` [..., m, k] times `args[first + 1]` [..., k, n]: vectors and batches included."""

    def macs(args: Any, _: Any) -> int:
        left, right = args[first].shape, args[first + 1].shape
        return math.prod(left) * (right[-1] if len(right) > 1 else 1)

    return macs


def _grouped_matmul(args: Any, result: Any) -> int:
    """Rows sorted by expert: every row of the result took one product of the shared width."""
    return result.numel() * args[0].shape[-1]


def _transposed_matmul(args: Any, _: Any) -> int:
    """[m, k] times [n, k] transposed, the layout of packed weights."""
    return math.prod(args[0].shape) * args[1].shape[0]


def _convolution(args: Any, result: Any) -> int:
    image, weight, transposed = args[0], args[1], bool(args[6])
    # a kernel [out, in / groups, ...] is applied at every output; transposed, [in, out / groups, ...] at every input
    return (image if transposed else result).numel() * math.prod(weight.shape[1:])


def _plain_convolution(args: Any, result: Any) -> int:
    return result.numel() * math.prod(args[1].shape[1:])


def _attention(args: Any, _: Any) -> int:
    """Queries [batch, heads, q, d], keys [batch, groups, k, d], values [batch, groups, k, v]: q k (d + v) a head."""
    query, key, value = (a.shape for a in args[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _packed_attention(args: Any, _: Any) -> int:
    """As `_attention`, with heads behind positions: [batch, q, heads, d], or [tokens, heads, d] of packed sequences."""
    query, key, value = args[:3]
    widths = query.shape[-1] + value.shape[-1]
    starts = [a for a in args[3:6] if isinstance(a, Tensor) and a.dim() == 1 and not a.is_floating_point()]
    if len(starts) < 2:
        return math.prod(query.shape[:-1]) * key.shape[-3] * widths
    lengths = [start.diff() for start in starts[:2]]
    return int((lengths[0] * lengths[1]).sum()) * query.shape[-2] * widths


def _multi_head(args: Any, _: Any) -> int:
    """torch's fused nn.MultiheadAttention: four projections and the attention between them."""
    (batch, queries, width), keys = args[0].shape, args[1].shape[1]
    return batch * width * (2 * queries * width + 2 * keys * width + 2 * queries * keys)


def _encoder_layer(args: Any, _: Any) -> int:
    """torch's fused nn.TransformerEncoderLayer: self-attention and two feed-forward layers."""
    batch, tokens, width = args[0].shape
    neurons = next(a for a in args[12:] if isinstance(a, Tensor) and a.dim() == 2).shape[0]
    return _multi_head((args[0], args[0]), None) + 2 * batch * tokens * width * neurons


FORMULAS: dict[str, Formula] = {
    "aten.mm": _matmul(0),
    "aten.bmm": _matmul(0),
    "aten.mv": _matmul(0),
    "aten.dot": _matmul(0),
    "aten.vdot": _matmul(0),
    "aten.addmm": _matmul(1),
    "aten._addmm_activation": _matmul(1),
    "aten.addmv": _matmul(1),
    "aten.addbmm": _matmul(1),
    "aten.baddbmm": _matmul(1),
    "aten._int_mm": _matmul(0),
    "aten._scaled_mm": _matmul(0),
    "aten._grouped_mm": _grouped_matmul,
    "aten._scaled_grouped_mm": _grouped_matmul,
    "aten._weight_int8pack_mm": _transposed_matmul,
    "aten.convolution": _convolution,
    "aten._convolution": _convolution,
    "aten.cudnn_convolution": _plain_convolution,
    "aten._slow_conv2d_forward": _plain_convolution,
    "aten._scaled_dot_product_flash_attention": _attention,
    "aten._scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten._scaled_dot_product_efficient_attention": _attention,
    "aten._scaled_dot_product_cudnn_attention": _attention,
    "aten._scaled_dot_product_fused_attention_overrideable": _attention,
    "aten._scaled_dot_product_attention_math_for_mps": _attention,
    "aten._flash_attention_forward_no_dropout_inplace": _packed_attention,
    "aten._flash_attention_forward": _packed_attention,
    "aten._efficient_attention_forward": _packed_attention,
    "aten._cudnn_attention_forward": _packed_attention,
    "aten._cudnn_attention_forward_no_dropout_inplace": _packed_attention,
    "aten._triton_scaled_dot_attention": _attention,
    "aten._triton_multi_head_attention": _multi_head,
    "aten._native_multi_head_attention": _multi_head,
    "aten._transformer_encoder_layer_fwd": _encoder_layer,
    "flex_attention": _attention,
}
"""The MACs of every operation that multiplies matrices, by its name in torch."""

if not hasattr(TorchDispatchMode, "supports_higher_order_operators"):  # torch before 2.7

    @flex_attention.py_impl(MacCounter)
    def _count_flex(counter: MacCounter, *args: Any, **kwargs: Any) -> Any:
        return counter.__torch_dispatch__(flex_attention, (), args, kwargs)


_MULTIPLIES = re.compile(
    r"(?:^|[._])(?:\w*mm|\w*mv|\w*matmul|\w*conv\w*|\w*attention\w*|\w*linear|\w*rnn\w*|\w*lstm\w*|\w*gru\w*|"
    r"\w*trilinear|\w*cdist\w*|\w*fft\w*|linalg\w*|inner|einsum|tensordot)(?:_|$|\.)"
)
_NOT_PRODUCTS = re.compile(r"norm|check|convert|shift|cross|_fused_")
_PLAIN = {"prim", "prims", "profiler", "c10d", "_c10d_functional", "debugprims", "rngprims"}


def _may_multiply(namespace: str, name: str) -> bool:
    """True for an operation that looks like a product, and for every one that torch itself doesn't own."""
    if namespace == "aten":
        return bool(_MULTIPLIES.search(name)) and not _NOT_PRODUCTS.search(name)
    return namespace not in _PLAIN


def observed_tokens(model: OpenModel, inputs: Mapping[str, Tensor]) -> int:
    """Positions in the first block's output, class tokens included, none merged: what `Anatomy.macs` takes."""
    seen: list[int] = []

    def look(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(as_rows(hidden_of(output), model.anatomy.stream_of(0).layout).shape[1])

    handle = model.module.get_submodule(model.anatomy.blocks[0]).register_forward_hook(look)
    try:
        with torch.no_grad(), model.unmerged():
            model.run(inputs)
    finally:
        handle.remove()
    return seen[0]
