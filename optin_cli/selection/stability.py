"""Estimate how far a ranking would change with other calibration examples, from the spread over its batches.

Batches come sorted by text length, so a plain random half may be of short texts. Neighbouring batches make pairs,
one of each pair goes to either half (balanced half-samples, McCarthy 1969): the halves are alike in length, and half
the difference of their scores scatters as the score of the whole set does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from optin_cli.artefacts.ranking import RankedSite, Ranking
from optin_cli.importance import FeatureWeights, scored_with, trajectories
from optin_cli.selection.choices import Floats

ALL = "all"
TARGET = 0.95
BUDGETS = (0.8, 0.6, 0.4)
FEWEST_BATCHES = 3
"""Fewer make one split at most, or none: too few to estimate scatter."""
_SPLITS = 100
_SIGMAS = 2.0
"""Standard errors to either side of a score: about 95 %."""


@dataclass(frozen=True)
class Agreement:
    """Of the units of one kind, or of all."""

    units: int
    halves: float
    """Spearman correlation between the scores of two halves of the batches, the mean of many splits."""
    full: float
    """Extrapolated to two sets as large as all of them (Spearman-Brown): 2 r / (1 + r)."""
    needed: int | None
    """Calibration examples that would bring `full` to the target; None where the halves do not agree at all."""
    error: float
    """Median relative standard error of a score."""
    undecided: dict[float, float]
    """MACs budget -> share of the units whose interval holds the score at which units are cut."""


@dataclass(frozen=True)
class Interval:
    """A unit near the cut: its score, and what it may as well be (about 95 %)."""

    site: str
    unit: int
    score: float
    low: float
    high: float
    cut: float
    """The score below which a unit of this cost goes."""


@dataclass(frozen=True)
class Stability:
    """See the module's docstring."""

    batches: int
    examples: int
    target: float
    agreement: dict[str, Agreement]
    """Kind -> agreement, and `all`."""
    near: dict[float, list[Interval]]
    """MACs budget -> the units closest to the cut, in standard errors."""

    @property
    def needed(self) -> int | None:
        """Examples that bring every kind, and all together, to the target."""
        needs = [found.needed for found in self.agreement.values()]
        return None if None in needs else max(n for n in needs if n is not None)

    @property
    def low(self) -> bool:
        """Return whether some kind falls short of the target."""
        return self.needed is None or self.needed > self.examples


def stability(
    ranking: Ranking, target: float = TARGET, *, splits: int = _SPLITS, nearest: int = 5, seed: int = 0
) -> Stability | None:
    """Estimate the stability of a ranking's scores from its batches.

    None when there are fewer than three of them, or when the scores are not means over batches.
    """
    batches = len(ranking.batch_weights)
    sites = [site for site in ranking.sites if site.units]
    if batches < FEWEST_BATCHES or not sites or any(len(s.by_batch) != batches for s in sites):
        return None
    scores = _by_batch(sites, scored_with(ranking))  # (batches, units)
    if scores is None:
        return None
    weights = np.array(ranking.batch_weights)
    kinds = np.concatenate([[site.kind] * site.units for site in sites])
    groups = {ALL: np.ones(len(kinds), dtype=bool)} | {kind: kinds == kind for kind in dict.fromkeys(kinds)}
    correlations, errors = _compared(scores, weights, groups, splits, seed)
    whole = weights @ scores / weights.sum()
    cuts = {budget: _cut(ranking, sites, whole, budget) for budget in BUDGETS}  # [units] each
    far = {b: np.abs(whole - cut) / np.maximum(errors, 1e-300) for b, cut in cuts.items()}
    examples = calibration_examples(ranking)
    agreement = {}
    for name, members in groups.items():
        full = spearman_brown(correlations[name], 2)
        relative = errors[members] / np.where(whole[members] > 0, whole[members], np.inf)
        agreement[name] = Agreement(
            units=int(members.sum()),
            halves=correlations[name],
            full=full,
            needed=examples_needed(examples, full, target),
            error=float(np.median(relative)),
            undecided={budget: float((f[members] < _SIGMAS).mean()) for budget, f in far.items()},
        )
    names = [(site.name, unit) for site in sites for unit in range(site.units)]
    near = {
        budget: [
            _interval(names[u], whole[u], errors[u], cuts[budget][u])
            for u in np.argsort(far[budget], kind="stable")[:nearest]
        ]
        for budget in BUDGETS
    }
    return Stability(batches, examples, target, agreement, near)


def _compared(
    scores: Floats, weights: Floats, groups: dict[str, np.ndarray], splits: int, seed: int
) -> tuple[dict[str, float], Floats]:
    """(mean correlation between halves of the batches for each group, standard error of each unit's score)."""
    correlations, variance = dict.fromkeys(groups, 0.0), np.zeros(scores.shape[1])
    for half in _halves(len(weights), splits, seed):
        one, other = (weights[h] @ scores[h] / weights[h].sum() for h in (half, ~half))
        variance += ((one - other) / 2) ** 2 / splits
        for name, members in groups.items():
            correlations[name] += spearman(one[members], other[members]) / splits
    return correlations, np.sqrt(variance)


def spearman(one: Floats, other: Floats) -> float:
    """Rank correlation, ties sharing their mean rank; 0 where one side is constant."""
    first, second = (_ranks(values) - (len(values) - 1) / 2 for values in (one, other))
    scale = math.sqrt(float(first @ first) * float(second @ second))
    return float(first @ second) / scale if scale > 0 else 0.0


def spearman_brown(correlation: float, factor: float) -> float:
    """Agreement of scores from `factor` times as many examples: k r / (1 + (k - 1) r). 0 where there is none."""
    r = max(correlation, 0.0)
    return factor * r / (1 + (factor - 1) * r)


def examples_needed(examples: int, agreement: float, target: float) -> int | None:
    """Examples that bring an agreement found with `examples` to `target`: Spearman-Brown, solved for the factor."""
    if agreement <= 0:
        return None
    if agreement >= 1:
        return 1
    return math.ceil(examples * target * (1 - agreement) / (agreement * (1 - target)))


def calibration_examples(ranking: Ranking) -> int:
    """The examples that were scored: of an embedding model each of two texts of a row is one."""
    pairs = ranking.model.get("task") == "embedding" and len(ranking.data.get("text") or ()) == 2
    return len(ranking.row_ids) * (2 if pairs else 1)


def _by_batch(sites: list[RankedSite], weights: FeatureWeights) -> Floats | None:
    """(batches, units): the score that each batch alone gives; None where scores are not means over batches.

    Every method's score is a mixture of the two parts, one for each kind of unit: it is solved for, not assumed.
    `weights` is how the trajectory's columns add up in it.
    """
    mixtures, trajectory = {}, trajectories(sites, weights)
    for kind in {site.kind for site in sites}:
        parts = np.concatenate([np.stack([trajectory[s.name], s.output], 1) for s in sites if s.kind == kind])
        score = np.concatenate([s.score for s in sites if s.kind == kind])
        size = np.maximum(np.abs(parts).max(axis=0), 1e-300)
        mixture = np.linalg.lstsq(parts / size, score, rcond=None)[0] / size  # (2,)
        if not np.allclose(parts @ mixture, score, rtol=1e-3, atol=1e-6 * np.abs(score).max()):
            return None
        mixtures[kind] = mixture
    found = []
    for site in sites:  # batches know the plain sum over the columns alone
        plain = site.trajectory.sum(1)
        share = np.divide(trajectory[site.name], plain, out=np.zeros_like(plain), where=plain > 0)  # (units,)
        parts = site.by_batch.astype(np.float64) * np.stack([share, np.ones_like(share)], axis=1)
        found.append(parts @ mixtures[site.kind])
    return np.concatenate(found, axis=1)


def _halves(batches: int, splits: int, seed: int) -> Iterator[np.ndarray]:
    """Draw the batches of the first half: one of each two neighbours; a last odd one in either."""
    rng = np.random.default_rng(seed)
    for _ in range(splits):
        first = rng.integers(0, 2, -(-batches // 2)).astype(bool)
        yield np.stack([first, ~first], axis=1).ravel()[:batches]


def _ranks(values: Floats) -> Floats:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count + 1) / 2)[place]


def _cut(ranking: Ranking, sites: list[RankedSite], scores: Floats, budget: float) -> Floats:
    """[units] the score at which a unit goes when the sites may use this share of their MACs."""
    each = np.concatenate([np.full(s.units, s.macs_per_unit(ranking.tokens)) for s in sites])
    worth = scores / each
    order = np.argsort(-worth, kind="stable")
    used = np.cumsum(each[order])
    last = min(int(np.searchsorted(used, budget * used[-1])), len(order) - 1)
    return each * worth[order[last]]


def _interval(unit: tuple[str, int], score: float, error: float, cut: float) -> Interval:
    low, high = max(score - _SIGMAS * error, 0.0), score + _SIGMAS * error
    return Interval(*unit, float(score), float(low), float(high), float(cut))
