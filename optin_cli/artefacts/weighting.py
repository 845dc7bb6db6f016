"""How the parts of a score count: the features of the blocks behind a unit, and lambda of OPTIN equation 1."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FeatureWeights = str | Sequence[float]
"""How the features of the blocks behind a unit count in its trajectory: a weight for each block, or a name."""
AUTO = "auto"
NAMED_WEIGHTS = (AUTO, "sum", "fourth-root", "root", "mean", "deep", "last")
"""As `auto_weighting` has it; OPTIN's sum; the sum over a root of their number, or over it; weighed by depth; the last
block's alone."""
OPTIN_SUM = "sum"
MILD, STRONG = ("fourth-root", 0.3), ("root", 0.1)
"""(feature weights, lambda) for much and for little that is to stay. Scores are stored as `MILD` has them."""
_TURN = 0.35


def auto_weighting(share: float) -> tuple[str, float]:
    """(feature weights, lambda) where a budget leaves `share` of what was ranked.

    A sum over all deeper blocks favours early units, and compensation mends much of what those blocks see. The less is
    to stay, the more that starves the late blocks (benchmarks/RESULTS.md has what else was tried).
    """
    return MILD if share >= _TURN else STRONG


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
