"""The base of budgets: amounts of one resource that a mask may use. A new kind is one class (budgets.py has several).

A mask uses `fixed`, plus the `costs` of each site's units, less what sums over sites count too much where a layer is
between two sites (`overcounted`). `scale` turns the amount that was asked into those terms. All of them depend on the
`Case`: the ranking, and what else a request says about counting.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np

from optin_cli.artefacts.latency import LatencyTable
from optin_cli.artefacts.ranking import RankedSite, Ranking
from optin_cli.errors import UsageError, param
from optin_cli.selection.choices import Floats, Ints
from optin_cli.selection.coupled_latency import CoupledTimes
from optin_cli.structure.coupled_layers import CoupledLayer


@dataclass(frozen=True)
class Case:
    """The facts that the costs of units depend on."""

    ranking: Ranking
    sites: Sequence[RankedSite]
    """Those of the ranking, in the order that masks name them."""
    tokens: float
    """Sequence length that MACs are counted for."""
    seen: Sequence[float]
    """[blocks] tokens that each block sees."""
    dense: bool = True
    """True if shares are of the original dense model; otherwise they are of the ranked one."""
    table: LatencyTable | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Site of heads -> dimensions of each, of a mask that cuts them. Numbers of units count whole heads there."""

    @cached_property
    def units(self) -> dict[str, int]:
        """Site -> units before pruning."""
        return {site.name: site.units for site in self.sites}

    @cached_property
    def coupled(self) -> list[CoupledLayer]:
        """Layers between two sites."""
        return self.ranking.coupled

    @cached_property
    def times(self) -> CoupledTimes | None:
        """The milliseconds of those layers, where there are any and a table."""
        return CoupledTimes(self.ranking, self.table) if self.table and self.coupled else None

    def halves(self, site: RankedSite) -> list[float]:
        """[coupled layers] pairs that one unit of a site has of each layer's cost."""
        return [layer.halves(self.units).get(site.name, 0.0) for layer in self.coupled]


@dataclass(frozen=True)
class Budget(ABC):
    """The amount of one resource that a mask may use.

    A kind needs `name`, `option`, `scale` and `unit_cost`; one whose costs are not proportional to the number of units
    says `linear = False` and has `costs`. The rest has defaults that suit most kinds::

        @register_budget
        class Heads(Budget):
            name, option = "heads", "--heads"

            def unit_cost(self, case, site):
                return 1.0 if site.kind == "heads" else 0.0

            def scale(self, case):
                return sum(site.units for site in case.sites if site.kind == "heads")

        select(ranking, Request(budgets=(Heads(0.5),)))
    """

    amount: float
    """A share of the whole in (0, 1], or an absolute amount."""

    name: ClassVar[str]
    """The resource: `MACs`."""
    option: ClassVar[str]
    """The option that asks for it: `--flops`."""
    help: ClassVar[str] = ""
    """The text of the option's help; by default the first line of the class's docstring."""
    metavar: ClassVar[str] = "FRACTION"
    """The placeholder of an amount in the option's help."""
    linear: ClassVar[bool] = True
    """Return whether n units of a site cost n times one, beside what all of them share."""
    whole_sequences: ClassVar[str] = ""
    """Why costs don't follow a schedule of merged tokens; '' where they do."""

    # ---- what was asked ----

    @classmethod
    def entries(cls) -> tuple[str, ...]:
        """The entries that hold amounts of this kind in a mask's `budget`."""
        return (cls.option.removeprefix("--"),)

    @property
    def key(self) -> str:
        """The entry of this one."""
        return self.entries()[0]

    @property
    def is_share(self) -> bool:
        """Return whether the amount is a share of the whole."""
        return True

    @property
    def unit(self) -> str:
        """What an amount is counted in; '' for a share."""
        return ""

    @property
    def asked(self) -> str:
        """For messages of errors: `flops=0.6`, or `--flops 0.6`."""
        return self.said(f"{self.amount:g}")

    def said(self, amount: str) -> str:
        """The same with another amount, with its unit or without."""
        number = amount.removesuffix(self.unit)
        if not self.unit:
            return param(self.key, meta=number)
        return param(self.entries()[0], meta=f"{number}{self.unit}", python=f"{self.key}={number}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """From the option's text. Raises `UsageError` with the way to write it."""
        way_out = f"write {param(cls.entries()[0], 0.6)}, or several as 0.9,0.8"
        return cls(parse_number(text, text, param(cls.entries()[0]), way_out))

    @classmethod
    def recorded(cls, record: Mapping[str, Any]) -> list[Self]:
        """The budgets of this kind in a mask's `budget`."""
        return [cls(record[key]) for key in cls.entries() if record.get(key) is not None]

    def check(self, table: LatencyTable | None) -> None:
        """Raise `UsageError` for an amount that no model could meet, or without the `table` that counting needs."""
        if self.is_share and not 0 < self.amount <= 1:
            raise UsageError(f"{self.asked} is not a fraction", "give the share to keep, in (0, 1]")
        if not 0 < self.amount < math.inf:
            amount = f"{self.amount:g}"
            said = param(self.entries()[0], meta=amount, python=f"{self.key}={amount}")
            raise UsageError(f"{said} is not an amount", "give more than 0")

    def eased(self, progress: float) -> Self | None:
        """The budget of a step on the way, `progress` in (0, 1): shares fall geometrically; None: nothing holds yet."""
        return replace(self, amount=self.amount**progress) if self.is_share else None

    def words(self, relative_to: str) -> str:
        """For people: `0.6 of the dense MACs`."""
        return f"{self.amount:g} of the {relative_to} {self.name}"

    # ---- what a mask uses ----

    @abstractmethod
    def scale(self, case: Case) -> float:
        """Return what an amount of 1 is, in the terms of `costs`: all that the dense model uses, for a share."""

    def fixed(self, case: Case) -> float:
        """Return what the model uses outside its sites, if the budget counts that."""
        return 0

    def unit_cost(self, case: Case, site: RankedSite) -> float:
        """Return what one unit of a site uses. Of a layer between two sites, each has half."""
        raise NotImplementedError(f"{type(self).__name__} has neither unit_cost nor costs")

    def base_cost(self, case: Case, site: RankedSite) -> float:
        """Return the base cost of a site, beside that of its units: of keys and values that its heads share."""
        return 0

    def costs(self, case: Case, site: RankedSite, counts: Ints | Floats) -> Floats:
        """[counts]: what so many units of a site use."""
        base = np.float64(self.base_cost(case, site))
        return np.float64(self.unit_cost(case, site)) * counts + base * (np.asarray(counts) > 0)

    def layers(self, case: Case, pairs: Sequence[float]) -> float:
        """Return what so many `pairs` of units use of each layer between two sites. 0: nothing depends on pairs."""
        return 0.0

    def shared_whole(self, case: Case) -> float:
        """Return what the layers between two sites use with all units."""
        return self.layers(case, [case.units[layer.made] * case.units[layer.read] for layer in case.coupled])

    def rank_costs(self, case: Case, site: RankedSite, heads: Ints | Floats, ranks: Ints | Floats) -> Floats:
        """[sizes]: what so many heads of a site use at lower ranks: as a rule what as many whole heads do that have as
        many dimensions."""
        return self.costs(case, site, heads * ranks / site.width)

    def knows_ranks(self, table: LatencyTable | None) -> bool:
        """Whether `rank_costs` can be told."""
        return self.linear

    def overcounted(self, case: Case, kept: Mapping[str, float]) -> float:
        """By how much sums over sites are above what `kept` units use."""
        return self.layers(case, [layer.pairs_saved(case.units, kept) for layer in case.coupled])

    def beyond(self, case: Case, site: RankedSite, counts: Ints) -> Floats:
        """[counts]: what other sites have of the layers that they share with this one, as it has `counts` units."""
        return np.float64(self.layers(case, case.halves(site))) * counts

    def capacity(self, case: Case) -> float:
        """Return what the sites may use. Raises `ArtefactError` if that can't be known."""
        return self.amount * self.scale(case) - self.fixed(case)

    def show(self, case: Case, used: float) -> str:
        """A use of the sites in the option's terms, rounded up so that it can be asked for."""
        return f"{math.ceil((self.fixed(case) + used) / self.scale(case) * 1e4) / 1e4:.4f}{self.unit}"

    def used(self, case: Case, kept: Mapping[str, float]) -> float:
        """Return what the whole model uses with `kept` units in each site."""
        if self.linear:  # whole numbers stay whole
            by_site = sum(
                kept[s.name] * self.unit_cost(case, s) + (self.base_cost(case, s) if kept[s.name] else 0)
                for s in case.sites
            )
        else:
            by_site = sum(float(self.costs(case, s, np.array([kept[s.name]]))[0]) for s in case.sites)
        return self.fixed(case) + by_site - self.overcounted(case, kept)

    def reached(self, case: Case, kept: Mapping[str, float]) -> dict[str, float]:
        """Return the entries of a mask's `reached` for this kind."""
        return {self.key: self.used(case, kept) / self.scale(case)}


def parse_number(number: str, text: str, option: str, way_out: str) -> float:
    """Parse `number`, a part of the option's `text`. Raises `UsageError` with the way to write it."""
    try:
        return float(number)
    except ValueError as error:
        raise UsageError(f"{option} {text!r} is not a number", way_out) from error
