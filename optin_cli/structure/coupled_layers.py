"""Layers between two sites: they cost the product of their units, not the sum of what each site has of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class CoupledLayer:
    """A layer that makes the units of one site from those of another. Each site has half of its cost."""

    made: str
    """Name of the site whose units come out of it."""
    read: str
    """Name of the site whose units go into it."""
    macs_per_token: float
    """MACs of a pair of their units, for each token of the first block."""
    params: float
    """Parameters of a pair of their units."""

    def halves(self, units: Mapping[str, int]) -> dict[str, float]:
        """Site -> pairs that one of its units has of the layer's cost, when sites have so many `units`."""
        return {self.made: units[self.read] / 2, self.read: units[self.made] / 2}

    def pairs_saved(self, units: Mapping[str, int], kept: Mapping[str, float]) -> float:
        """Pairs that cost nothing although the sites' halves count them, when `kept` of `units` stay."""
        made, read = kept[self.made], kept[self.read]
        return made * (units[self.read] - read) / 2 + read * (units[self.made] - made) / 2


def overcounted(
    layers: Iterable[CoupledLayer], units: Mapping[str, int], kept: Mapping[str, int]
) -> tuple[float, float]:
    """(MACs for each token, parameters) by which sums over sites are above what the `kept` of `units` cost."""
    found = [(layer, layer.pairs_saved(units, kept)) for layer in layers]
    return sum(s * layer.macs_per_token for layer, s in found), sum(s * layer.params for layer, s in found)
