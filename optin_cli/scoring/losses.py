"""The two terms of OPTIN importance as pure functions, for many masked variants at once.

I(u) = sum over deeper blocks z of L_MD(F_z, F_z without u) + lambda * L_KD(y, y without u)   (OPTIN, equation 1)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


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
        total = 2 * (product.square().sum((1, 2)) + (product * product.transpose(1, 2)).sum((1, 2)))
    else:
        gram = middle.transpose(1, 2) @ middle  # (v, d, d)
        change_gram = change.transpose(1, 2) @ change
        cross = change.transpose(1, 2) @ middle
        total = 2 * ((gram * change_gram).sum((1, 2)) + (cross * cross.transpose(1, 2)).sum((1, 2)))
    return total / rows**2


def output_change(
    dense: Tensor, variants: Tensor, weights: Tensor, *, temperature: float, regression: bool
) -> Tensor:
    """L_KD of each variant: KL(dense || variant) of logits at a temperature, or the squared error of values.

    `dense` is (batch, rows, classes), `variants` (v, batch, rows, classes), `weights` (batch, rows); returns
    (v,): the weighted mean over rows.
    """
    if regression:
        change = (variants - dense).square().sum(-1)  # (v, batch, rows)
    else:
        # KL of two close distributions is a difference of second order: float32 would leave two digits of it
        teacher = F.log_softmax(dense.double() / temperature, dim=-1)
        student = F.log_softmax(variants.double() / temperature, dim=-1)
        change = (teacher.exp() * (teacher - student)).sum(-1)
    return (change * weights).sum((1, 2)) / weights.sum()


def relation_probe(features: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient, with respect to F, of <V, F F^T> / K for a random sign matrix V: (V + V^T) F / K.

    `features` F is (K, d) with unit rows; so is the result. Pulled back to a mask m, its square is an unbiased
    estimate of ||d(F F^T)/dm||_F^2 / K^2 (METHOD section 3).
    """
    rows = len(features)
    signs = torch.empty(rows, rows).bernoulli_(0.5, generator=generator).mul_(2).sub_(1).to(features.device)
    return (signs + signs.t()) @ features / rows


def output_probe(
    output: Tensor,
    weights: Tensor,
    generator: torch.Generator,
    *,
    temperature: float,
    regression: bool,
) -> Tensor:
    """A scalar whose squared derivative is an unbiased estimate of the second-order term of `output_change`.

    Logits: the log-probability of classes drawn from the model itself (the true Fisher, no labels), over
    sqrt(2) because KL is half a squared Fisher norm. Values: random signs.
    """
    scale = (weights / weights.sum()).sqrt()  # (batch, rows)
    if regression:
        signs = torch.empty(output.shape).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
        return ((signs.to(output.device) * output).sum(-1) * scale).sum()
    log_p = F.log_softmax(output / temperature, dim=-1)
    flat = log_p.detach().exp().flatten(0, -2).cpu()
    drawn = torch.multinomial(flat, 1, generator=generator).view(output.shape[:-1]).to(output.device)
    chosen = log_p.gather(-1, drawn[..., None])[..., 0]  # (batch, rows)
    return (chosen * scale).sum() / 2**0.5
