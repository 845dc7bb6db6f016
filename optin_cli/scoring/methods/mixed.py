"""Mixed: heads by ablation, the rest by curvature. There are few heads, so that removing each costs little."""

from __future__ import annotations

from optin_cli.scoring.methods.curvature import CurvatureMethod
from optin_cli.structure.anatomy import HEADS


class MixedMethod(CurvatureMethod):
    """Curvature whose heads are ablated."""

    name = "mixed"
    spreads = False
    ablated = frozenset({HEADS})
