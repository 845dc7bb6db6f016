"""The numerics of compensation: least squares on sums over calibration rows (docs/method.md, section 6).

A layer gives y = W x + b. Let e be what its output lacks to bring the pruned model to the dense one.
The best change (D, d) of (W, b) is a regression of e on x, and a ridge on D is a pull toward the original
weight. Everything follows from sums over rows, kept apart for the rows that are fitted and those held out, so
that the held-out error of any change comes in closed form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from optin_cli.compensation.settings import BIAS, FULL, NONE, RIDGES, SCALE
from optin_cli.execution.precision import exact_products

LADDER = (FULL, SCALE, BIAS)
SCALE_LIMITS = (-10.0, 10.0)
"""`scale` is rejected for a site with a factor outside of these (PTF)."""


@dataclass
class Moments:
    """Weighted sums over rows of inputs x [rows, features] and errors e [rows, outputs], float64.

    x gets a last feature that is always one: its sums are the plain sums.
    """

    gram: Tensor
    """[features + 1, features + 1]: sums of x x^T."""
    cross: Tensor
    """[features + 1, outputs]: sums of x e^T."""
    ee: Tensor
    """[outputs]: sums of e^2."""
    squares: float = 0.0
    """Sum of the squared weights."""

    @classmethod
    def zeros(cls, features: int, outputs: int, device: torch.device | str = "cpu") -> Moments:
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        return cls(zeros(features + 1, features + 1), zeros(features + 1, outputs), zeros(outputs))

    def add(self, x: Tensor, e: Tensor, weight: Tensor) -> None:
        """Add rows x [rows, features] and e [rows, outputs], each with its weight [rows].

        Products are of the dtype of x, sums float64: with d = x - m, m about the mean, and r = sum w d,
        sum w x x^T = sum w d d^T + (s s^T - r r^T) / sum w, of which the first part rounds off a share of the variance,
        not of the mean.
        """
        if not len(x):
            return
        by_row, total = weight.to(x.dtype), _total(weight)
        with exact_products(x.device):
            (x, about_x, sums), (e, about_e, lacking) = (
                _about_mean(values, by_row, total) for values in (x, e.to(x.dtype))
            )
            weighted = (x * by_row[:, None]).T
            _add_symmetric(self.gram[:-1, :-1], weighted, x)
            self.cross[:-1] += weighted @ e
            squares = (by_row @ e.square()).double() + (lacking.square() - about_e.square()) / total
        self.gram[:-1, :-1].addr_(sums, sums / total).addr_(about_x, about_x / total, alpha=-1)
        self.cross[:-1].addr_(sums, lacking / total).addr_(about_x, about_e / total, alpha=-1)
        self.gram[-1, :-1] += sums
        self.gram[:-1, -1] += sums
        self.gram[-1, -1] += total
        self.cross[-1] += lacking
        self.ee += squares
        self.squares += float(_total(weight.square()))

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.gram + other.gram,
            self.cross + other.cross,
            self.ee + other.ee,
            self.squares + other.squares,
        )

    def of(self, outputs: slice) -> Moments:
        """Those of some of the outputs."""
        return Moments(self.gram, self.cross[:, outputs], self.ee[outputs], self.squares)

    @property
    def rows(self) -> float:
        """Sum of the weights."""
        return float(self.gram[-1, -1])

    @property
    def effective_rows(self) -> float:
        """Effective number of rows: (sum w)^2 / sum w^2 (Kish)."""
        return self.rows**2 / self.squares if self.squares else 0.0

    def error(self, change: Change | None = None) -> Tensor:
        """Sum of squared errors of each output, [outputs], after a change."""
        if change is None:
            return self.ee
        solution = torch.cat([change.weight, change.bias[:, None]], 1)  # (outputs, features + 1)
        return (self.ee + ((solution @ self.gram - 2 * self.cross.T) * solution).sum(1)).clamp(min=0)


def _about_mean(rows: Tensor, weight: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows less about their mean; the weighted sums of that, which are near zero, and of the rows, in float64."""
    mean = (weight @ rows) / total.to(rows.dtype)
    rows = rows - mean
    left = (weight @ rows).double()
    return rows, left, total * mean.double() + left


_STRIP = 256
"""Rows of a Gram matrix that are made at a time."""


def _add_symmetric(gram: Tensor, weighted: Tensor, x: Tensor) -> None:
    """Add weighted @ x, which is symmetric, in strips that begin at the diagonal: half of the products."""
    for start in range(0, len(gram), _STRIP):
        end = start + _STRIP
        strip = weighted[start:end] @ x[:, start:]
        gram[start:end, start:] += strip
        gram[end:, start:end] += strip[:, _STRIP:].T


def _total(rows: Tensor) -> Tensor:
    """The sum of rows, in float64 whatever they are in."""
    return rows.sum(0, dtype=torch.float64)


class Rows:
    """Rows on their way into moments, many at a time: products of a few read and write more than they multiply."""

    _MOST = 2**23
    """Numbers that wait: 32 MB in float32."""
    _ROUNDED = 1e-2
    """From which ridge on products may be float32: it is far above what that rounds off."""

    def __init__(
        self,
        features: int,
        outputs: int,
        device: torch.device | str = "cpu",
        ridges: Sequence[float] = RIDGES,
    ) -> None:
        """`ridges` are those that will be tried."""
        self.dtype = torch.float32 if min(ridges, default=0) >= self._ROUNDED else torch.float64
        self._moments = Moments.zeros(features, outputs, device)
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, x: Tensor, e: Tensor, weight: Tensor) -> None:
        """As `Moments.add`."""
        self._waiting.append((x.to(self.dtype), e.to(self.dtype), weight.to(self.dtype)))
        if sum(x.numel() + e.numel() for x, e, _ in self._waiting) > self._MOST:
            self.moments()

    def moments(self) -> Moments:
        """Those of all rows so far."""
        if self._waiting:
            x, e, weight = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
            self._waiting.clear()
            self._moments.add(x, e, weight)
        return self._moments


@dataclass(frozen=True)
class Layer:
    """The facts that a fit needs of a layer."""

    weight: Tensor
    """[outputs, features], of kept units alone."""
    has_bias: bool
    gain: Tensor
    """[outputs]: what each output is multiplied by before it is compared."""
    width: int = 1
    """Neighbouring features that one factor of `scale` multiplies: those of a unit."""

    @property
    def features(self) -> int:
        return self.weight.shape[1]

    @property
    def units(self) -> int:
        return self.features // self.width


@dataclass(frozen=True)
class Change:
    """A correction to add to a layer: weight [outputs, features] and bias [outputs], float64."""

    method: str
    ridge: float | None
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Refit:
    """The change that a layer gets, and its sum of squared held-out errors before and after."""

    change: Change
    before: float
    after: float
    note: str = ""


def refit(
    fit: Moments,
    held: Moments,
    layer: Layer,
    method: str = "auto",
    ridges: Sequence[float] = RIDGES,
) -> Refit:
    """Choose a change of `layer` on `held` rows among those fitted to `fit`; return it fitted to both.

    `auto` takes whatever has the smallest held-out error: full or scale with one of `ridges`, bias, or nothing.
    Another `method` is taken with its best ridge, whatever its error; where it can't be fitted the next below
    takes its place. The note says what could not be fitted, and why.
    """
    before = _loss(held, layer)
    best, after = nothing(layer), before
    if method == NONE or not held.rows:
        return Refit(best, before, after, "" if method == NONE else "too few rows to hold any out")
    notes = {}
    for step in LADDER if method == "auto" else LADDER[LADDER.index(method) :]:
        reason = _reason_against(step, fit, layer)
        tried = [] if reason else _fits(step, fit, layer, ridges if step != BIAS else (0.0,))
        if not tried:
            notes[step] = reason or f"no factors of `{step}` within limits"
            continue
        errors = [_loss(held, layer, change) for change in tried]
        lowest = min(range(len(tried)), key=errors.__getitem__)
        if method != "auto" or errors[lowest] < after:
            best, after = tried[lowest], errors[lowest]
        if method != "auto":
            break
    if best.method != NONE:
        everything = _fits(best.method, fit + held, layer, (best.ridge or 0.0,))
        best = everything[0] if everything else best
    # ignore methods weaker than the chosen one
    above = LADDER[: LADDER.index(best.method)] if best.method in LADDER else LADDER
    reasons = dict.fromkeys(notes[step] for step in above if step in notes)
    return Refit(best, before, after, "; ".join(reasons))


def _loss(moments: Moments, layer: Layer, change: Change | None = None) -> float:
    """Sum of squared errors in the residual stream."""
    return float((moments.error(change) * layer.gain.double().square()).sum())


def nothing(layer: Layer) -> Change:
    weight = torch.zeros_like(layer.weight, dtype=torch.float64)
    return Change(NONE, None, weight, weight.new_zeros(weight.shape[0]))


def _reason_against(method: str, fit: Moments, layer: Layer) -> str | None:
    """Why a method can't be fitted to these rows; None if it can."""
    if method == BIAS:
        return None if layer.has_bias else "no bias"
    if not layer.units:
        return "no units left"
    wanted = layer.features if method == FULL else layer.units
    if fit.effective_rows > wanted:
        return None
    what = "features" if method == FULL else "factors"
    return f"{fit.effective_rows:.0f} rows are too few for {wanted} {what}"


def _fits(method: str, moments: Moments, layer: Layer, ridges: Sequence[float]) -> list[Change]:
    """The change that `method` fits to `moments` with each of the ridges; without those that are unusable."""
    if method == BIAS:
        return [_with_bias(BIAS, None, nothing(layer).weight, moments, layer)]
    xx, xe = _centred(moments, layer)
    if method == FULL:
        matrix, target = xx, xe
    else:
        matrix, target = _scale_equations(xx, xe, layer)
    found = []
    for ridge, solution in zip(ridges, _ridge_solutions(matrix, target, ridges), strict=True):
        if method == FULL:
            weight = solution.T  # (features, outputs) -> (outputs, features)
        else:
            factors = 1 + solution[:, 0]
            if not bool(((factors >= SCALE_LIMITS[0]) & (factors <= SCALE_LIMITS[1])).all()):
                continue
            weight = layer.weight.double() * solution[:, 0].repeat_interleave(layer.width)
        if bool(torch.isfinite(weight).all()):
            found.append(_with_bias(method, ridge, weight, moments, layer))
    return found


def _with_bias(method: str, ridge: float | None, weight: Tensor, moments: Moments, layer: Layer) -> Change:
    """Complete a change of the weight by the bias that leaves no mean error."""
    bias = (moments.cross[-1] - weight @ moments.gram[-1, :-1]) / moments.rows
    return Change(method, ridge, weight, bias if layer.has_bias else torch.zeros_like(bias))


def _centred(moments: Moments, layer: Layer) -> tuple[Tensor, Tensor]:
    """Sums of x x^T and x e^T: around the means where a bias takes those up."""
    gram, cross = moments.gram[:-1, :-1], moments.cross[:-1]
    if not layer.has_bias:
        return gram, cross
    mean = moments.gram[-1, :-1] / moments.rows
    return gram - torch.outer(mean, moments.gram[-1, :-1]), cross - torch.outer(mean, moments.cross[-1])


def _scale_equations(xx: Tensor, xe: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    """Normal equations of one factor a unit, less 1: matrix [units, units], target [units, 1].

    A unit's part of the output is W_u x_u, so matrix_uv = sum over their features of (W^T W) o xx.
    """
    weight = layer.weight.double() * layer.gain.double()[:, None]
    units, width = layer.units, layer.width
    products = (weight.T @ weight) * xx
    matrix = products.view(units, width, units, width).sum((1, 3))
    target = (weight.T * xe * layer.gain.double()).sum(1).view(units, width).sum(1)
    return matrix, target[:, None]


def _ridge_solutions(matrix: Tensor, target: Tensor, ridges: Sequence[float]) -> list[Tensor]:
    """(matrix + ridge * its mean diagonal)^-1 target: by Cholesky, by eigh where that breaks down."""
    unit = float(matrix.diagonal().mean())
    solutions, spectrum = [], None
    for ridge in ridges:
        shifted = matrix.clone()
        shifted.diagonal().add_(ridge * unit)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not failed:
            solutions.append(torch.cholesky_solve(target, factor))
            continue
        spectrum = spectrum or torch.linalg.eigh(matrix)
        values, vectors = spectrum
        shifted_values = values.clamp(min=0) + ridge * unit
        usable = shifted_values > 1e-12 * shifted_values.max().clamp(min=1e-300)
        inverse = torch.where(usable, 1 / shifted_values.clamp(min=1e-300), 0.0)
        solutions.append(vectors @ (inverse[:, None] * (vectors.T @ target)))
    return solutions
