"""Turn the basis of every head, so that its first dimensions are the best ones: the same function, in other weights.

A head multiplies two pairs of matrices: logits are (q B)(k B'^T)^T and outputs are (c B)(B^-1 W_o) for any B B'^T = I.
With the second moments of queries, keys and context, the bases below make any number of first dimensions the best
approximation of that rank: of the logits in the mean square, and of the output. CORP (arXiv 2602.05243) and ModeGPT
(Lin et al., ICLR 2025) cut large models so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optin_cli.structure.anatomy import Producer, Site
from optin_cli.structure.layers import like_weight, matrix
from optin_cli.transforms.slicing import part_rows

_FLOOR = 1e-7
"""Of the largest eigenvalue of a moment: what lies below is taken to be no smaller."""


@dataclass
class HeadMoments:
    """Sums over positions of the products of what each head of a site computes; float64."""

    queries: Tensor
    """[units, width, width]"""
    keys: Tensor
    """[units, width, width], around the mean of their sequence: what all keys share changes no attention."""
    context: Tensor
    """[units, width, width]"""
    context_sum: Tensor
    """[units, width]"""
    positions: Tensor
    """[] those of the context."""

    @classmethod
    def zeros(cls, site: Site, device: torch.device) -> HeadMoments:
        def sums(*shape: int) -> Tensor:
            return torch.zeros(site.units, *shape, dtype=torch.float64, device=device)

        square = (site.width, site.width)
        positions = torch.zeros((), dtype=torch.float64, device=device)
        return cls(sums(*square), sums(*square), sums(*square), sums(site.width), positions)


def rotate(
    model: nn.Module, site: Site, moments: HeadMoments, rounded: Callable[[Tensor], Tensor] = lambda t: t
) -> None:
    """Give the layers around a site's heads the rotated weights, in place; `rounded` as they will be stored.

    Queries and keys: Cq^1/2 Ck^1/2 = U S V^T, B_q = Cq^-1/2 U S^1/2 and B_k = Ck^-1/2 V S^1/2, so that B_q B_k^T = I.
    Values and output: Cc^1/2 W_o^T = U S V^T, B_v = Cc^-1/2 U S^1/2, and the output's columns are S^1/2 V^T. Where both
    have a bias, the mean of the context goes through to the output's, and Cc is the covariance.
    """
    everything = torch.arange(site.units)
    (query, key, value), consumer = site.attended, _layer(model, site.consumer)
    by_query, by_key = _pair(moments.queries, moments.keys)
    out = matrix(consumer).detach().double().unflatten(1, (site.units, site.width)).movedim(0, -1)
    moved = all(_layer(model, path).bias is not None for path in (value[0].path, site.consumer))
    mean = moments.context_sum / moments.positions.clamp(min=1)
    second = moments.context / moments.positions.clamp(min=1)
    if moved:
        second = second - mean[:, :, None] * mean[:, None, :]
    root, inverse = _roots(second)
    u, s, vt = torch.linalg.svd(root @ out, full_matrices=False)  # out is [units, width, d]
    u, s, vt = _padded(u, s, vt, site.width)
    by_value = inverse @ u * s.sqrt()[:, None, :]
    _turn(model, site, query, everything, by_query, None, rounded)
    _turn(model, site, key, everything, by_key, None, rounded)
    _turn(model, site, value, everything, by_value, mean if moved else None, rounded)
    if moved:
        shift = torch.einsum("uwd,uw->d", out, mean)
        _set(consumer, "bias", consumer.bias.detach().double() + shift, rounded)
    turned = (s.sqrt()[:, :, None] * vt).movedim(-1, 0).flatten(1)  # [d, units * width]
    _set(consumer, "weight", like_weight(consumer, turned), rounded)


def _pair(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """B_q and B_k of every head, [units, width, width]."""
    (q_root, q_inverse), (k_root, k_inverse) = _roots(queries), _roots(keys)
    u, s, vt = torch.linalg.svd(q_root @ k_root)
    balanced = s.sqrt()[:, None, :]
    return q_inverse @ u * balanced, k_inverse @ vt.mT * balanced


def _roots(moments: Tensor) -> tuple[Tensor, Tensor]:
    """The square roots of symmetric matrices and of their inverses."""
    values, vectors = torch.linalg.eigh(moments)
    least = (_FLOOR * values.amax(-1, keepdim=True)).clamp(min=1e-30)
    roots = values.clamp(min=least).sqrt()
    return (vectors * roots[:, None, :]) @ vectors.mT, (vectors / roots[:, None, :]) @ vectors.mT


def _padded(u: Tensor, s: Tensor, vt: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """A decomposition of `width` values where the output has fewer dimensions than a head: the others are 0."""
    missing = width - s.shape[-1]
    if missing <= 0:
        return u, s, vt
    return (
        torch.nn.functional.pad(u, (0, missing)),
        torch.nn.functional.pad(s, (0, missing)),
        torch.nn.functional.pad(vt, (0, 0, 0, missing)),
    )


def _turn(
    model: nn.Module,
    site: Site,
    made: tuple[Producer, int],
    units: Tensor,
    basis: Tensor,
    mean: Tensor | None,
    rounded: Callable[[Tensor], Tensor],
) -> None:
    """Rows of a producer's part: W -> B^T W and b -> B^T (b - mean), head by head."""
    (producer, part), layer = made, _layer(model, made[0].path)
    rows = part_rows(site, producer, part, units).to(basis.device)
    weight = matrix(layer).detach().double().clone()
    weight[rows] = (basis.mT @ weight[rows].unflatten(0, (site.units, site.width))).flatten(0, 1)
    _set(layer, "weight", like_weight(layer, weight), rounded)
    if layer.bias is not None:
        bias = layer.bias.detach().double().clone()
        old = bias[rows].unflatten(0, (site.units, site.width))
        old = old if mean is None else old - mean
        bias[rows] = (basis.mT @ old[..., None]).flatten()
        _set(layer, "bias", bias, rounded)


def _set(layer: Any, name: str, value: Tensor, rounded: Callable[[Tensor], Tensor]) -> None:
    old = getattr(layer, name)
    setattr(layer, name, nn.Parameter(rounded(value).to(old.dtype), requires_grad=old.requires_grad))


def _layer(model: nn.Module, path: str) -> Any:
    return model.get_submodule(path)
