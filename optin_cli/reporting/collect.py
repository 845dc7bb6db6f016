"""Read what a report is about: a ranking, and the masks, models, sweeps and latency table that go with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from optin_cli.artefacts.facts import Asked, Reached
from optin_cli.artefacts.kinds import stated_kind
from optin_cli.artefacts.latency import LatencyTable, read_latency_table
from optin_cli.artefacts.mask import Mask, read_mask
from optin_cli.artefacts.point import SUFFIX, Point, Sweep, read_sweep
from optin_cli.artefacts.pruned import FILE_NAME, PrunedRecord, ranks_of, read_pruned
from optin_cli.artefacts.ranking import Ranking, read_ranking
from optin_cli.errors import ArtefactError, BudgetError, UsageError
from optin_cli.selection.select import select
from optin_cli.selection.settings import Request

DEFAULT_SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
"""Budgets that are shown where no mask is given."""
_MAKE = "give a ranking, made by `optin score`"


@dataclass(frozen=True)
class Budget:
    """One budget of the report: what it keeps, and what is known about the model made of it."""

    label: str
    keep: dict[str, list[int]]
    tokens: float
    """Sequence length that MACs are counted for."""
    merges: list[int] = field(default_factory=list)
    reached: Reached | None = None
    """None of the dense model."""
    score: float | None = None
    """Share of the score that is kept."""
    point: Point | None = None
    fits: tuple[dict[str, Any], ...] = ()
    """The result of compensation at each site and layer."""
    record: PrunedRecord | None = None
    asked: Asked | None = None
    """What the mask was made for."""
    ranks: dict[str, int] = field(default_factory=dict)
    """Site of heads -> dimensions of each, where that is not all."""

    @property
    def kept(self) -> dict[str, int]:
        """Site -> number of units."""
        return {name: len(indices) for name, indices in self.keep.items()}


@dataclass(frozen=True)
class Report:
    """Everything that a report shows."""

    ranking: Ranking
    path: Path
    """Of the ranking."""
    budgets: tuple[Budget, ...]
    """The dense model, then the largest budget first."""
    points: tuple[Point, ...] = ()
    table: LatencyTable | None = None
    sweep: Path | None = None

    @property
    def pruned(self) -> tuple[Budget, ...]:
        """The budgets but the dense model."""
        return self.budgets[1:]


def collect(paths: Sequence[str | Path]) -> Report:
    """Read artefacts in any order: one ranking, or a sweep that holds it; masks, pruned models, a latency table.

    Raises `UsageError` for a path that is none of these, for no ranking and for several; `ArtefactError` for damaged
    ones and for those that came from another ranking.
    """
    found = _Found()
    for path in map(Path, paths):
        found.add(path)
    path, ranking = found.the_ranking()
    budgets: dict[str, Budget] = {}
    for sweep in found.sweeps:
        _add_sweep(budgets, sweep, ranking)
    for name, mask in found.masks:
        _check_origin(name, mask.ranking_digest, ranking)
        budgets.setdefault(mask.digest, _of_mask(_label(name), mask))
    for folder, record in found.models:
        _add_model(budgets, folder, record, ranking)
    several = sorted(budgets.values(), key=lambda one: -_share(one)) or _proposed(ranking)
    units = {site.name: list(range(site.units)) for site in ranking.sites}
    dense = Budget("dense", units, several[0].tokens if several else ranking.tokens, ranking.merges)
    points = tuple(point for sweep in found.sweeps for point in sweep.points)
    where = found.sweeps[0].folder if found.sweeps else None
    return Report(ranking, path, (dense, *several), points, found.table, where)


@dataclass
class _Found:
    rankings: list[tuple[Path, Ranking]] = field(default_factory=list)
    masks: list[tuple[Path, Mask]] = field(default_factory=list)
    models: list[tuple[Path, PrunedRecord]] = field(default_factory=list)
    sweeps: list[Sweep] = field(default_factory=list)
    table: LatencyTable | None = None

    def add(self, path: Path) -> None:
        if (path / FILE_NAME).is_file():
            self.models.append((path, read_pruned(path)))
        elif path.is_dir() and any(path.glob(f"*{SUFFIX}")):
            self.sweeps.append(read_sweep(path))
        elif path.is_dir():
            raise UsageError(f"{path} is neither a pruned model nor a sweep", _MAKE)
        elif not path.exists():
            raise UsageError(f"nothing at {path}", _MAKE)
        elif (kind := stated_kind(path)) == "latency table":
            self.table = read_latency_table(path)
        elif kind == "mask" or path.suffix == ".json":
            self.masks.append((path, read_mask(path)))
        else:
            self.rankings.append((path, read_ranking(path)))

    def the_ranking(self) -> tuple[Path, Ranking]:
        """The one that is given, or that the points of a sweep came from."""
        if len(self.rankings) > 1:
            names = ", ".join(str(path) for path, _ in self.rankings)
            raise UsageError(f"a report is about one ranking, not {names}", "make one for each")
        if self.rankings:
            return self.rankings[0]
        for sweep in self.sweeps:
            first = min(sweep.points, key=lambda point: (point.variant, point.seed))
            for path in sorted(sweep.folder.glob("*.h5")):
                ranking = read_ranking(path)
                if ranking.digest == first.ranking:
                    return path, ranking
        where = (
            f"{self.sweeps[0].folder} does not hold the ranking of its points"
            if self.sweeps
            else "no ranking"
        )
        raise UsageError(where, _MAKE)


def _add_sweep(budgets: dict[str, Budget], sweep: Sweep, ranking: Ranking) -> None:
    """The points that came from this ranking: other seeds and variants are in the curves alone."""
    for point in sweep.main:
        if point.ranking != ranking.digest:
            continue
        mask = read_mask(sweep.folder / f"{point.name}.mask.json")
        record = read_pruned(sweep.directory(point))
        budgets[mask.digest] = _of_mask(point.name, mask, point=point, record=record, fits=_fits(record))


def _add_model(budgets: dict[str, Budget], folder: Path, record: PrunedRecord, ranking: Ranking) -> None:
    last = record.history[-1]
    _check_origin(folder, last["ranking"], ranking)
    if there := budgets.get(last["mask"]):
        if not there.fits:
            budgets[last["mask"]] = replace(there, fits=_fits(record), record=record)
    elif len(record.history) == 1:
        budgets[last["mask"]] = Budget(
            _label(folder), record.kept, last["budget"]["tokens"], record.merges, last["reached"],
            fits=_fits(record), record=record, asked=last["budget"], ranks=ranks_of(record),
        )  # fmt: skip
    else:
        raise UsageError(
            f"{folder} was pruned {len(record.history)} times: its units count in the first model",
            "give the mask of the last pruning, too, before it",
        )


def _of_mask(label: str, mask: Mask, **more: Any) -> Budget:
    kept = mask.objective["kept"]
    tokens = mask.budget["tokens"]
    return Budget(
        label, mask.keep, tokens, mask.merges, mask.reached, kept, asked=mask.budget, ranks=mask.ranks, **more
    )


def _fits(record: PrunedRecord) -> tuple[dict[str, Any], ...]:
    sites: Sequence[Mapping[str, Any]] = record.history[-1].get("compensation", {}).get("sites", ())
    return tuple(dict(site) for site in sites)


def _check_origin(what: Path, digest: str, ranking: Ranking) -> None:
    if digest != ranking.digest:
        raise ArtefactError(
            f"{what} came from another ranking ({digest[:12]}) than the one given ({ranking.digest[:12]})",
            "report what belongs together",
        )


def _proposed(ranking: Ranking) -> list[Budget]:
    """Masks at the default shares, as far as they can be met."""
    found = []
    for share in DEFAULT_SHARES:
        try:
            found.append(_of_mask(f"{share:g} of the MACs", select(ranking, Request(flops=share))))
        except BudgetError:
            break
    return found


def _label(path: Path) -> str:
    return path.name.removesuffix(".json").removesuffix(".mask")


def _share(budget: Budget) -> float:
    reached = budget.reached
    return reached["macs"] / reached["dense_macs"] if reached else 1.0
