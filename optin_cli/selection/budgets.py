"""The kinds of budgets that ship, and those that others register: MACs, parameters, memory, latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Self, TypeVar

import numpy as np

from optin_cli.artefacts.latency import LatencyTable
from optin_cli.artefacts.ranking import RankedSite, Ranking
from optin_cli.errors import ArtefactError, InputError, UsageError, first_line, param
from optin_cli.selection.budget import Budget, Case, parse_number
from optin_cli.selection.choices import Floats, Ints
from optin_cli.selection.coupled_latency import predicted_ms
from optin_cli.sizes import parse_size

MIB = 2**20
_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "int8": 1}


class Macs(Budget):
    """A share of the MACs of all sites, on a sequence of the case's tokens."""

    name, option = "MACs", "--flops"
    help = "Share of the MACs of all layers to keep."

    def scale(self, case: Case) -> float:
        return case.ranking.dense_macs(case.tokens) if case.dense else case.ranking.macs(case.tokens)

    def unit_cost(self, case: Case, site: RankedSite) -> float:
        return site.macs_per_unit(case.seen[site.block])

    def base_cost(self, case: Case, site: RankedSite) -> float:
        return site.base_macs_per_token * case.seen[site.block]

    def layers(self, case: Case, pairs: Sequence[float]) -> float:
        return (
            sum(n * layer.macs_per_token for n, layer in zip(pairs, case.coupled, strict=True)) * case.tokens
        )

    def reached(self, case: Case, kept: Mapping[str, float]) -> dict[str, float]:
        macs = self.used(case, kept)
        return {
            "flops": macs / self.scale(case),
            "macs": macs,
            "dense_macs": case.ranking.dense_macs(case.tokens),
        }


class Params(Budget):
    """A share of the model's parameters, embeddings and all."""

    name, option = "parameters", "--params"
    help = "Share of the model's parameters to keep, embeddings included."

    def scale(self, case: Case) -> float:
        ranking = case.ranking
        if case.dense:
            return float(ranking.dense["params"])
        return fixed_params(ranking) + sum(site.params(site.units) for site in ranking.sites)

    def fixed(self, case: Case) -> float:
        return fixed_params(case.ranking)

    def unit_cost(self, case: Case, site: RankedSite) -> float:
        return site.params_per_unit

    def base_cost(self, case: Case, site: RankedSite) -> float:
        return site.base_params

    def layers(self, case: Case, pairs: Sequence[float]) -> float:
        return sum(n * layer.params for n, layer in zip(pairs, case.coupled, strict=True))

    def reached(self, case: Case, kept: Mapping[str, float]) -> dict[str, float]:
        return {"params": self.used(case, kept), "dense_params": case.ranking.dense["params"]}


class Memory(Budget):
    """MiB of weights, as stored."""

    name, option = "memory", "--memory"
    help, metavar = "What the stored weights may take, e.g. 60MiB.", "SIZE"

    @property
    def is_share(self) -> bool:
        return False

    @property
    def unit(self) -> str:
        return "MiB"

    @classmethod
    def parse(cls, text: str) -> Self:
        return cls(
            parse_size(text, param("memory"), "MiB", f"write {param('memory', 60)} for 60 MiB, or 1.5GiB")
            / MIB
        )

    def words(self, relative_to: str) -> str:
        return f"{self.amount:g} MiB of weights"

    def scale(self, case: Case) -> float:
        return MIB

    def fixed(self, case: Case) -> float:
        return fixed_params(case.ranking) * stored_bytes(case.ranking)

    def unit_cost(self, case: Case, site: RankedSite) -> float:
        return site.params_per_unit * stored_bytes(case.ranking)

    def base_cost(self, case: Case, site: RankedSite) -> float:
        return site.base_params * stored_bytes(case.ranking)

    def layers(self, case: Case, pairs: Sequence[float]) -> float:
        return Params(1.0).layers(case, pairs) * stored_bytes(case.ranking)

    def reached(self, case: Case, kept: Mapping[str, float]) -> dict[str, float]:
        size, dense = stored_bytes(case.ranking), case.ranking.dense["params"]
        return {
            "memory": Params(1.0).used(case, kept) * size / MIB,
            "dense_memory": dense * size / MIB,
        }


@dataclass(frozen=True)
class Latency(Budget):
    """A share of the latency that a table gives the whole model, or milliseconds."""

    ms: bool = False
    """Return whether the amount is in milliseconds."""

    name, option, linear = "latency", "--latency", False
    help = f"Share of the latency, or milliseconds (12.5ms); needs {param('latency_table')}."
    metavar = "FRACTION|MS"
    whole_sequences = "a latency table knows whole sequences alone"

    @classmethod
    def entries(cls) -> tuple[str, ...]:
        return ("latency", "latency_ms")

    @property
    def key(self) -> str:
        return "latency_ms" if self.ms else "latency"

    @property
    def is_share(self) -> bool:
        return not self.ms

    @property
    def unit(self) -> str:
        return "ms" * self.ms

    @classmethod
    def parse(cls, text: str) -> Self:
        way_out = f"write {param('latency', 0.6)} for a share, or 12.5ms for milliseconds"
        return cls(
            parse_number(text.removesuffix("ms"), text, param("latency"), way_out), ms=text.endswith("ms")
        )

    @classmethod
    def recorded(cls, record: Mapping[str, Any]) -> list[Self]:
        given = [(record.get(key), key == "latency_ms") for key in cls.entries()]
        return [cls(amount, ms) for amount, ms in given if amount is not None]

    def check(self, table: LatencyTable | None) -> None:
        if not self.ms and not 0 < self.amount <= 1:
            raise UsageError(
                f"{self.asked} is not a fraction",
                f"give the share to keep, in (0, 1]; milliseconds are written {self.amount:g}ms",
            )
        super().check(table)
        if table is None:
            raise UsageError(
                f"{param('latency')} needs to know what units cost on the device",
                "measure it once with `optin bench MODEL --table FILE.json`, then give "
                f"{param('latency_table', meta='FILE.json')}",
            )

    def words(self, relative_to: str) -> str:
        return f"{self.amount:g} ms" if self.ms else super().words(relative_to)

    def scale(self, case: Case) -> float:
        table = _table_of(case)
        if self.ms:
            return 1.0
        if not case.dense:
            return predicted_ms(case.ranking, table, {site.name: site.units for site in case.ranking.sites})
        if table.model["digest"] != table.model["dense_digest"]:
            raise ArtefactError(
                f"the latency table is of the pruned {table.model['id']}: it can't give shares of the dense model",
                f"make one of the dense model, or use {param('relative_to', 'current')}",
            )
        return table.total_ms

    def fixed(self, case: Case) -> float:
        return _table_of(case).fixed_ms

    def costs(self, case: Case, site: RankedSite, counts: Ints | Floats) -> Floats:
        return self.rank_costs(case, site, counts, np.full(len(counts), site.width))

    def rank_costs(self, case: Case, site: RankedSite, heads: Ints | Floats, ranks: Ints | Floats) -> Floats:
        return _table_of(case).site_ms(site.name, heads, ranks)

    def knows_ranks(self, table: LatencyTable | None) -> bool:
        return table is not None and table.knows_ranks()

    def shared_whole(self, case: Case) -> float:
        return case.times.whole if case.times else 0.0

    def overcounted(self, case: Case, kept: Mapping[str, float]) -> float:
        return case.times.overcounted(kept) if case.times else 0.0

    def beyond(self, case: Case, site: RankedSite, counts: Ints) -> Floats:
        return case.times.beyond(site.name, counts) if case.times else np.zeros(len(counts))

    def reached(self, case: Case, kept: Mapping[str, float]) -> dict[str, float]:
        if case.table is None:
            return {}
        return {
            "latency_ms": predicted_ms(case.ranking, case.table, kept, case.ranks),
            "table_latency_ms": case.table.total_ms,
        }


BUILT_IN: tuple[type[Budget], ...] = (Macs, Params, Memory, Latency)
_KINDS: dict[str, type[Budget]] = {kind.option: kind for kind in BUILT_IN}
ENTRY_POINTS = "optin.budgets"
"""The group of entry points under which a package offers kinds by their option: `heads = "module:Heads"`."""
_offered = False
"""Whether they were looked for."""
Kind = TypeVar("Kind", bound=type[Budget])


def register_budget(kind: Kind) -> Kind:
    """Add a kind of budget to those that `optin` parses and shows; returns it, so that it serves as a decorator.

    Raises `UsageError` where a built-in kind has its option, or one of its entries in a mask's `budget`.

    Example:
        >>> @optin.register_budget
        ... class Heads(optin.Budget):
        ...     name, option = "heads", "--heads"
        ...
        ...     def unit_cost(self, case, site):
        ...         return site.kind == "heads"
        ...
        ...     def scale(self, case):
        ...         return sum(site.units for site in case.sites if site.kind == "heads")
        >>> mask = optin.select(ranking, budgets=[Heads(0.5)])
        >>> mask.reached["heads"]
        0.5
    """
    for other in BUILT_IN:
        if kind.option == other.option or set(kind.entries()) & set(other.entries()):
            raise UsageError(f"{kind.__name__} claims {kind.option}, which is the budget on {other.name}")
    _KINDS[kind.option] = kind
    return kind


def budget_kinds() -> dict[str, type[Budget]]:
    """Option -> kind, the built-in ones first; those that installed packages offer are loaded."""
    global _offered
    if not _offered:
        _offered = True
        for entry in entry_points(group=ENTRY_POINTS):
            _load(entry)
    return dict(_KINDS)


def _load(entry: EntryPoint) -> None:
    """Register what a package offers. In place of what can't be used is a kind that says why once it is asked for."""
    try:
        kind = entry.load()
        if not (isinstance(kind, type) and issubclass(kind, Budget) and kind.option == f"--{entry.name}"):
            raise InputError(f"it is not a Budget with the option --{entry.name}")
        register_budget(kind)
    except (ImportError, AttributeError, InputError, UsageError) as error:
        _KINDS.setdefault(f"--{entry.name}", _unusable(entry, first_line(error)))


def _unusable(entry: EntryPoint, why: str) -> type[Budget]:
    class Unusable(Budget):
        name, option = entry.name, f"--{entry.name}"
        help = f"Can't be used: {entry.value}: {why}"

        @classmethod
        def parse(cls, text: str) -> Self:
            raise InputError(f"can't load {entry.value} for {param(cls.entries()[0])}: {why}")

        def scale(self, case: Case) -> float:
            raise InputError(f"can't load {entry.value} for {param(self.key)}: {why}")

    return Unusable


def stored_bytes(ranking: Ranking) -> int:
    """Bytes of one stored parameter: of the weights on disk where the ranking says, else as it computed."""
    return _BYTES[str(ranking.dense.get("dtype", ranking.dtype))]


def fixed_params(ranking: Ranking) -> int:
    """Parameters outside the sites: embeddings, norms, biases, the task head."""
    return int(ranking.dense["params"] - ranking.dense["site_params"])


def _table_of(case: Case) -> LatencyTable:
    assert case.table is not None, "Latency.check has refused a request without a table"
    return case.table
