"""The score of a unit, put together from its parts: OPTIN's equation 1, and the weights in it.

    I(u) = sum over the deeper blocks z of w_z * trajectory_z(u) + lambda * output(u)

w_z are the feature weights, all 1 in the paper (`OPTIN_SUM`). lambda is given on a scale on which the two terms have
the same median, so that it means the same for every model. This needs numpy alone: `select` works without torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from optin_cli.artefacts.ranking import Array, RankedSite, Ranking
from optin_cli.artefacts.site_losses import SiteLosses

FeatureWeights = str | Sequence[float]
"""Weights of the deeper blocks' features in a unit's trajectory: a number for each block, or a name."""
AUTO = "auto"
NAMED_WEIGHTS = (AUTO, "sum", "fourth-root", "root", "mean", "deep", "last")
"""As `auto_weighting` has it; OPTIN's sum; the sum over a root of their number, or over it; weighed by depth; the last
block's alone."""
OPTIN_SUM = "sum"
_MILD, _STRONG = ("fourth-root", 0.3), ("root", 0.1)
_TURN = 0.35
_RISE = 3
"""The power that the loss of a sublayer rises with: 1 and 3 found the best masks of Gemma, and 3 changes those less
that lose few heads (benchmarks/RESULTS.md)."""
_WRITING, _WRITTEN = ("language-modeling", "text-to-text", "speech-recognition"), 30.0
"""Tasks whose output is what may follow each token, out of a vocabulary, and its lambda."""
_CHANNELS = "channels"


def auto_weighting(kinds: Collection[str], task: str, share: float = 1.0) -> tuple[str, float]:
    """(feature weights, lambda) for units of these kinds, in a model for `task`, where a budget leaves `share` of what
    was ranked.

    A sum over all deeper blocks favours early units, and compensation mends much of what those blocks see. The less is
    to stay, the more that starves the late blocks, and those of a CNN at any budget (benchmarks/RESULTS.md has the
    numbers, and what else was tried). A distribution over a vocabulary at many positions says far more of a model than
    a few classes, or one vector. Scores are stored as a budget of everything would have them.
    """
    features, output_weight = _MILD if share >= _TURN and _CHANNELS not in kinds else _STRONG
    return features, _WRITTEN if task in _WRITING else output_weight


def column_weights(columns: Sequence[int], depth: int, weights: FeatureWeights) -> NDArray[np.float64]:
    """The weight of each trajectory column, of blocks `columns`, in a model of which `depth` blocks are measured."""
    if not isinstance(weights, str):
        return np.array([weights[block] for block in columns], dtype=np.float64)
    count, blocks = max(1, len(columns)), np.array(columns, dtype=np.float64)
    named = {
        "sum": np.ones(len(columns)),
        "fourth-root": np.full(len(columns), count**-0.25),
        "root": np.full(len(columns), count**-0.5),
        "mean": np.full(len(columns), 1 / count),
        "deep": (blocks + 1) / max(1, depth),
        "last": (blocks == depth - 1).astype(np.float64),
    }
    return named[weights]


def combine(
    sites: Iterable[RankedSite], output_weight: float, feature_weights: FeatureWeights = OPTIN_SUM
) -> dict[str, Array]:
    """Scores from their parts: I(u) = sum of the trajectory columns + lambda * output (OPTIN equation 1).

    One lambda for the whole model, such that median(lambda * output) = output_weight * median(trajectory).
    """
    sites = list(sites)
    trajectory = trajectories(sites, feature_weights)
    if output_weight == 0:
        return trajectory
    scale = _median_ratio(trajectory, {s.name: s.output for s in sites})
    return {s.name: trajectory[s.name] + output_weight * scale * s.output for s in sites}


def losses(
    ranking: Ranking,
    of: Iterable[SiteLosses],
    output_weight: float,
    feature_weights: FeatureWeights = OPTIN_SUM,
) -> dict[str, Array]:
    """Site -> losses [cuts] from their parts, on the scale of `combine` of the ranking's units."""
    depth = measured_depth(ranking.sites)
    scale = output_weight * output_scale(ranking.sites, feature_weights) if output_weight else 0.0
    return {
        one.site: (one.trajectory * column_weights(one.columns, depth, feature_weights)).sum(axis=1)
        + scale * one.output
        for one in of
    }


def with_whole(scores: Array, loss: float) -> Array:
    """Scores [units] that add up to what the whole sublayer costs, `loss`, where that is more than their sum.

    A unit may hardly be missed while others do the same, and behind a norm that undoes any scaling the derivative of
    all of them together is zero. So what the sum lacks grows with the third power of the share of the sum that is gone:
    the first ones to go cost little more than they did, the last ones most of it. Units keep their order.
    """
    total, order = float(scores.sum()), np.argsort(scores, kind="stable")
    if loss <= total:
        return scores.copy()
    sums = np.cumsum(scores[order]) if total > 0 else np.arange(1.0, 1 + len(scores))
    gone = np.concatenate([[0.0], sums / sums[-1]])
    found = scores.copy()
    found[order] += (loss - total) * np.diff(gone**_RISE)
    return found


def scored_with(ranking: Ranking) -> str:
    """The `feature_weights` of a ranking's own scores."""
    named = ranking.settings.get("feature_weights", OPTIN_SUM)
    return _auto(ranking)[0] if named == AUTO else str(named)


def own_output_weight(ranking: Ranking) -> float:
    """The lambda of a ranking's own scores."""
    given = ranking.settings.get("output_weight")
    return _auto(ranking)[1] if given is None else float(given)


def _auto(ranking: Ranking) -> tuple[str, float]:
    """What the scores of a ranking were combined with where the budget decides: before it was recorded, whatever the
    task."""
    features, output_weight = ranking.settings.get("weighting") or auto_weighting(ranking.kinds, "")
    return str(features), float(output_weight)


def output_scale(sites: Iterable[RankedSite], feature_weights: FeatureWeights = OPTIN_SUM) -> float:
    """median(trajectory) / median(output) over all units: what puts the two terms on one scale."""
    sites = list(sites)
    return _median_ratio(trajectories(sites, feature_weights), {s.name: s.output for s in sites})


def trajectories(sites: Iterable[RankedSite], feature_weights: FeatureWeights) -> dict[str, Array]:
    """The weighted sum of each site's trajectory columns, [units]."""
    sites = list(sites)
    depth = measured_depth(sites)
    weights = {s.name: column_weights(s.columns, depth, feature_weights) for s in sites}
    return {s.name: (s.trajectory * weights[s.name]).sum(axis=1) for s in sites}


def measured_depth(sites: Iterable[RankedSite]) -> int:
    """Blocks up to the last one whose feature is in a trajectory."""
    return max((block for site in sites for block in site.columns), default=-1) + 1


def _median_ratio(trajectory: dict[str, Array], output: dict[str, Array]) -> float:
    outputs = np.concatenate([*output.values(), np.zeros(0)])
    middle = float(np.median(outputs)) if len(outputs) else 0.0
    return float(np.median(np.concatenate(list(trajectory.values())))) / middle if middle > 0 else 0.0
