"""Measure how far the outputs of a model are from its baseline's, by the term that a task compares them with.

In float64: KL of two close distributions is a difference of second order, of which float32 would leave two digits.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

Term = Literal["kl", "binary_kl", "squares"]
KL: Term = "kl"
"""Of the classes of a row, of which one is right."""
BINARY_KL: Term = "binary_kl"
"""Of each label of a row, on or off by itself, summed."""
SQUARES: Term = "squares"
"""Squared error of values."""


def class_kl(dense: Tensor, ours: Tensor) -> Tensor:
    """KL(dense || ours) of each row in nats: logits [..., classes] -> [...]."""
    teacher, student = (F.log_softmax(logits.double(), dim=-1) for logits in (dense, ours))
    return (teacher.exp() * (teacher - student)).sum(-1)


def binary_kl(dense: Tensor, ours: Tensor) -> Tensor:
    """The sum of KL(dense || ours) over the labels of each row, in nats: logits [..., labels] -> [...]."""
    p, q = dense.double(), ours.double()
    on = p.sigmoid() * (F.logsigmoid(p) - F.logsigmoid(q))
    off = (-p).sigmoid() * (F.logsigmoid(-p) - F.logsigmoid(-q))
    return (on + off).sum(-1)
