"""What the units of a site cost, in a model and in a ranking."""

from __future__ import annotations


class UnitCosts:
    """Costs of a number of units: so much for each, and a base that is there as long as one unit is."""

    macs_per_token: float
    macs_per_pair: float
    params_per_unit: float
    base_macs_per_token: float
    base_params: float

    def macs_per_unit(self, tokens: float) -> float:
        """MACs one unit costs on a sequence of `tokens` tokens (docs/method.md, section 4, PTF's FLOPs model)."""
        return self.macs_per_token * tokens + self.macs_per_pair * tokens * tokens

    def macs(self, tokens: float, units: float) -> float:
        """MACs of so many units on a sequence of `tokens` tokens."""
        return units * self.macs_per_unit(tokens) + (self.base_macs_per_token * tokens if units else 0)

    def params(self, units: float) -> float:
        """Parameters of so many units."""
        return units * self.params_per_unit + (self.base_params if units else 0)
