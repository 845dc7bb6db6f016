"""The two terms of OPTIN importance as pure functions, for many masked variants at once.

I(u) = sum over deeper blocks z of L_MD(F_z, F_z without u) + lambda * L_KD(y, y without u)   (OPTIN, equation 1)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from optin_cli.tasks.divergence import BINARY_KL, SQUARES, Term, binary_kl, class_kl

Signs = torch.Generator | Iterator[Tensor]
"""The source of random signs: a generator, or what `draw_signs` took from one, in the order of use."""

_HELD = 1 << 24  # logits in float64 at a time


def unit_rows(features: Tensor) -> Tensor:
    """L2-normalise the last dimension, in float32."""
    return F.normalize(features.float(), dim=-1)


def relational_change(dense: Tensor, variants: Tensor) -> Tensor:
    """||F F^T - F' F'^T||_F^2 / K^2 for each variant (OPTIN's manifold distillation loss, a mean over pairs).

    `dense` F is (K, d), `variants` F' is (v, K, d), rows of unit length; returns (v,).
    With E = F' - F and the midpoint G = F + E / 2 the difference of the two relation matrices is G E^T + E G^T:
    no cancellation however small E is. The K x K product is used when K < 2 d, else the d x d form of it.
    """
    rows, width = dense.shape
    change = variants - dense  # (v, K, d)
    middle = dense + change / 2
    if rows < 2 * width:
        product = middle @ change.transpose(1, 2)  # (v, K, K)
        total = _squares(product + product.transpose(1, 2))
    else:
        gram = middle.transpose(1, 2) @ middle  # (v, d, d)
        change_gram = change.transpose(1, 2) @ change
        cross = change.transpose(1, 2) @ middle
        total = 2 * ((gram * change_gram).sum((1, 2)) + (cross * cross.transpose(1, 2)).sum((1, 2)))
    return total / rows**2


def _squares(matrices: Tensor) -> Tensor:
    """Squared Frobenius norm of each matrix, without a squared copy."""
    return torch.linalg.vector_norm(matrices, dim=(1, 2)).square()


def output_change(
    dense: Tensor, variants: Tensor, weights: Tensor, *, temperature: float, term: Term
) -> Tensor:
    """L_KD of each variant: KL(dense || variant) of logits at a temperature, of the classes of a row or of each of its
    labels by itself, or the squared error of values.

    `dense` is (batch, rows, classes), `variants` (v, batch, rows, classes), `weights` (batch, rows); returns
    (v,): the weighted sum over rows.
    """
    if term == SQUARES:
        change = (variants - dense).square().sum(-1)  # (v, batch, rows)
        return (change * weights).sum((1, 2))
    kl = binary_kl if term == BINARY_KL else class_kl
    total = weights.new_zeros(len(variants), dtype=torch.float64)
    # a few examples at a time: rows of a language model are as long as its vocabulary
    step = max(1, _HELD * dense.shape[0] // max(1, variants.numel()))
    parts = zip(dense.split(step), variants.split(step, 1), weights.split(step), strict=True)
    for ours, theirs, weight in parts:
        change = kl(ours.double() / temperature, theirs.double() / temperature)
        total += (change * weight).sum((1, 2))
    return total


def relation_probe(features: Tensor, generator: Signs) -> Tensor:
    """The gradient, with respect to F, of <V, F F^T> / K for a random sign matrix V: (V + V^T) F / K.

    `features` F is (K, d) with unit rows; so is the result. Pulled back to a mask m, its square is an unbiased
    estimate of ||d(F F^T)/dm||_F^2 / K^2 (docs/method.md, section 3).
    """
    rows = len(features)
    signs = _signs((rows, rows), generator, features.device)
    return (signs + signs.t()) @ features / rows


def output_probe(
    output: Tensor, weights: Tensor, generator: Signs, *, temperature: float, term: Term
) -> Tensor:
    """A random gradient with respect to `output` whose square, pulled back to a mask, is an unbiased estimate of
    the second-order term of `output_change` (a weighted sum over rows).

    Values: signs. Logits: with H = diag(p) - p p^T = sum_c p_c (e_c - p)(e_c - p)^T, the true Fisher that needs no
    labels, sum_c s_c sqrt(p_c) (e_c - p) / T for signs s, over sqrt(2) because KL is half a squared Fisher norm; of
    labels by themselves H = diag(p (1 - p)).
    """
    scale = weights.sqrt()[..., None]  # (batch, rows, 1)
    signs = _signs(output.shape, generator, output.device)
    if term == SQUARES:
        return signs * scale
    if term == BINARY_KL:
        p = torch.sigmoid(output / temperature)
        return signs * (p * (1 - p)).sqrt() * scale / (temperature * 2**0.5)
    p = F.softmax(output / temperature, dim=-1)
    # in place: a row may be as long as a vocabulary
    found = signs.to(torch.promote_types(signs.dtype, p.dtype)).mul_(p.sqrt())
    found.addcmul_(p, found.sum(-1, keepdim=True), value=-1)
    return found.mul_(scale / (temperature * 2**0.5))


def draw_signs(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Zeros and ones, drawn on the CPU so that they are the same on every device; in bytes, which are quick to copy."""
    return torch.randint(0, 2, tuple(shape), generator=generator, dtype=torch.uint8)


def _signs(shape: Sequence[int], source: Signs, device: torch.device) -> Tensor:
    """Random +-1, float32."""
    drawn = draw_signs(shape, source) if isinstance(source, torch.Generator) else next(source).view(shape)
    return drawn.to(device).to(torch.float32).mul_(2).sub_(1)
