"""Mixed: heads by ablation, the rest by curvature. There are few heads, so that removing each costs little."""

from __future__ import annotations

from optin_cli.models.anatomy import HEADS
from optin_cli.scoring.methods.curvature import CurvatureMethod


class MixedMethod(CurvatureMethod):
    """Curvature whose heads are ablated."""

    name = "mixed"
    spreads = False
    ablated = frozenset({HEADS})
