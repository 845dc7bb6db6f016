"""How the parts of a score count: the features of the blocks behind a unit, and lambda of OPTIN equation 1."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

FeatureWeights = str | Sequence[float]
"""How the features of the blocks behind a unit count in its trajectory: a weight for each block, or a name."""
AUTO = "auto"
NAMED_WEIGHTS = (AUTO, "sum", "fourth-root", "root", "mean", "deep", "last")
"""As `auto_weighting` has it; OPTIN's sum; the sum over a root of their number, or over it; weighed by depth; the last
block's alone."""
OPTIN_SUM = "sum"
_MILD, _STRONG = ("fourth-root", 0.3), ("root", 0.1)
_TURN = 0.35
_CHANNELS = "channels"


def auto_weighting(kinds: Collection[str], share: float = 1.0) -> tuple[str, float]:
    """(feature weights, lambda) for units of these kinds where a budget leaves `share` of what was ranked.

    A sum over all deeper blocks favours early units, and compensation mends much of what those blocks see. The less is
    to stay, the more that starves the late blocks, and those of a CNN at any budget (benchmarks/RESULTS.md has the
    numbers, and what else was tried). Scores are stored as a budget of everything would have them.
    """
    return _MILD if share >= _TURN and _CHANNELS not in kinds else _STRONG


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
