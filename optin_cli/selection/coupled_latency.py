"""Latency of layers between two sites: a table's curves hold a part of such a layer each, measured while the
other site was whole.

Of a site's time, the layer's part is taken to be as large as of the site's MACs, and to shrink in both sites as their
curves do: with shares g of the sites' whole times left it takes (H + H') g g', where sums count H g + H' g'.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from optin_cli.artefacts.latency import LatencyTable
from optin_cli.artefacts.ranking import Ranking
from optin_cli.selection.choices import Floats, Ints


class CoupledTimes:
    """The milliseconds of the layers between two sites of a ranking, from the model's latency table."""

    def __init__(self, ranking: Ranking, table: LatencyTable) -> None:
        self.table = table
        self.layers = ranking.coupled
        # the table may be of the dense model, and the ranking of a pruned one
        self.full = {name: int(site["units"]) for name, site in table.sites.items()}
        units = {site.name: site.units for site in ranking.sites}
        macs = {site.name: site.macs_per_token for site in ranking.sites}
        for layer in self.layers:
            for mine, other in ((layer.made, layer.read), (layer.read, layer.made)):
                macs[mine] += layer.macs_per_token * (self.full[other] - units[other]) / 2
        self.parts = [
            {
                mine: self._whole(mine) * layer.macs_per_token * self.full[other] / 2 / (macs[mine] or 1)
                for mine, other in ((layer.made, layer.read), (layer.read, layer.made))
            }
            for layer in self.layers
        ]
        """Of each layer: site -> what the site's curve has of it, in ms, when both are whole."""

    @property
    def whole(self) -> float:
        """Return the time of all these layers when nothing is pruned, in ms."""
        return sum(sum(part.values()) for part in self.parts)

    def overcounted(self, kept: Mapping[str, float]) -> float:
        """Milliseconds by which the sum of the curves is above what `kept` units take."""
        total = 0.0
        for part in self.parts:
            (made, ms), (read, other_ms) = part.items()
            left, other = (float(self._left(name, [kept[name]])[0]) for name in (made, read))
            total += ms * left * (1 - other) + other_ms * other * (1 - left)
        return total

    def beyond(self, name: str, counts: Ints) -> Floats:
        """[counts]: what other sites' curves have of the layers of this site, as it shrinks with `counts` units."""
        others = sum(sum(part.values()) - part[name] for part in self.parts if name in part)
        return others * self._left(name, counts)

    def _whole(self, name: str) -> float:
        return float(self.table.site_ms(name, [self.full[name]])[0])

    def _left(self, name: str, counts: Ints | list[float]) -> Floats:
        """The share of a site's time that `counts` units take."""
        whole = self._whole(name)
        return self.table.site_ms(name, counts) / whole if whole else np.zeros(len(counts))


def predicted_ms(
    ranking: Ranking, table: LatencyTable, kept: Mapping[str, float], ranks: Mapping[str, int] | None = None
) -> float:
    """The milliseconds of a model with `kept` units in each site; where heads are at `ranks` they count whole ones."""
    over = CoupledTimes(ranking, table).overcounted(kept) if ranking.coupled else 0.0
    widths = {site.name: site.width for site in ranking.sites}
    heads = {name: kept[name] * widths[name] / rank for name, rank in (ranks or {}).items()}
    return table.model_ms({**kept, **heads}, {**widths, **(ranks or {})}) - over
