"""A latency table: what the units of each site cost in milliseconds on one device, batch and length. JSON."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optin_cli.artefacts.facts import Curve, TimedModel, TimedSetting, TimedSite, UsedTable
from optin_cli.artefacts.files import atomic_file, digest_json, read_record, to_json
from optin_cli.errors import ArtefactError

FORMAT = "optin-latency-table"
SCHEMA_VERSION = 1
Numbers = NDArray[Any] | list[int] | list[float]
_NEVER = 1e300
"""Milliseconds."""
MAKER = "optin bench MODEL --table"


@dataclass
class LatencyTable:
    """See the module's docstring. A model's latency is `fixed_ms` plus its sites' milliseconds."""

    model: TimedModel
    setting: TimedSetting
    total_ms: float
    """Median forward of the whole model."""
    fixed_ms: float
    """The part of it that is left without any unit: embeddings, norms, the task head."""
    curves: list[Curve]
    sites: dict[str, TimedSite]
    """By name."""
    created: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        return digest_json(asdict(self))

    def site_ms(self, name: str, counts: Numbers, rank: Numbers | int = 0) -> NDArray[np.float64]:
        """Milliseconds that `counts` units of a site take, heads at a `rank`, one for all or each its own, 0 for whole
        ones: linear between the measured ones. Ranks below the least measured cost what that does.
        """
        curve = self.curves[self.sites[name]["curve"]]
        counts, rank = np.broadcast_arrays(np.asarray(counts, np.float64), np.asarray(rank, np.float64))
        found = np.interp(counts, curve["counts"], curve["ms"])
        if (times := curve.get("ranks")) is None:
            return found
        at = np.array([np.interp(counts, times["counts"], ms) for ms in times["ms"]])  # [ranks, counts]
        ranks = np.asarray(times["ranks"], np.float64)
        above = np.clip(np.searchsorted(ranks, rank), 1, len(ranks) - 1)
        share = np.clip((rank - ranks[above - 1]) / (ranks[above] - ranks[above - 1]), 0, 1)
        each = np.arange(len(counts))
        cut = (1 - share) * at[above - 1, each] + share * at[above, each]
        return np.where((rank > 0) & (rank < ranks[-1]), cut, found)

    def knows_ranks(self, name: str = "") -> bool:
        """Whether heads were timed at lower ranks: those of a site, or any."""
        curves = [self.curves[self.sites[name]["curve"]]] if name else self.curves
        return any("ranks" in curve for curve in curves)

    def model_ms(self, kept: Mapping[str, float], ranks: Mapping[str, int] | None = None) -> float:
        """Predicted milliseconds of a model with `kept` units in each site, heads at their `ranks`."""
        of = ranks or {}
        return self.fixed_ms + sum(
            float(self.site_ms(name, [units], of.get(name, 0))[0]) for name, units in kept.items()
        )

    @property
    def sizes(self) -> int:
        """Return how many sizes of sites were timed."""
        grids = (row for curve in self.curves if "ranks" in curve for row in curve["ranks"]["ms"])
        return sum(len(curve["counts"]) for curve in self.curves) + sum(map(len, grids))

    def describe(self) -> UsedTable:
        """The setting and where the table is from, for the record of what it was used for."""
        return {**self.setting, "model": self.model["id"], "of": self.model["digest"], "digest": self.digest}


def processor_name() -> str:
    """The CPU's model as the system names it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def write_latency_table(path: str | Path, table: LatencyTable) -> None:
    """Write a latency table as JSON: the whole file or nothing.

    Example:
        >>> optin.write_latency_table(folder / "cpu.json", table)
    """
    path = Path(path)
    with atomic_file(path) as temporary:
        data = {"format": FORMAT, "schema_version": SCHEMA_VERSION, **asdict(table)}
        temporary.write_text(to_json(data) + "\n")


def read_latency_table(path: str | Path) -> LatencyTable:
    """Read and check a table.

    Raises `UsageError` for a path that can't be read, `ArtefactError` for anything that is not a valid table.

    Example:
        >>> optin.read_latency_table(folder / "cpu.json").setting["batch_size"]
        2
    """
    path = Path(path)
    table = read_record(
        path, LatencyTable, "a latency table", FORMAT, SCHEMA_VERSION, maker=MAKER,
        optional=("created", "versions"), shallow=("curves", "sites"),
    )  # fmt: skip
    problems = [problem for check in (_curves, _sites) for problem in check(table)]
    if problems:
        raise ArtefactError(
            f"{path} is a damaged latency table: {'; '.join(problems)}", f"run `{MAKER}` again"
        )
    return table


def _curves(table: LatencyTable) -> list[str]:
    finite = _are_times([table.total_ms, table.fixed_ms])
    problems = [] if finite else ["times that are not finite"]
    for index, curve in enumerate(table.curves):
        counts, ms = (curve.get(key) if isinstance(curve, dict) else None for key in ("counts", "ms"))
        if not isinstance(counts, list) or not isinstance(ms, list) or len(counts) != len(ms) or not counts:
            problems.append(f"curve {index} lacks a time for each count")
        elif not all(type(n) is int for n in counts) or counts[0] != 0 or not _ascend(counts):
            problems.append(f"curve {index}: counts must be whole numbers that ascend from 0")
        elif not _are_times(ms):
            problems.append(f"curve {index}: times must be finite numbers")
        elif "ranks" in curve and not _is_grid(curve["ranks"]):
            problems.append(
                f"curve {index}: times of ranks must be finite numbers, one for each rank and count"
            )
    return problems


def _is_grid(times: Any) -> bool:
    """Whether these are times of several ranks, each with one for each of the counts."""
    parts: Any = [times.get(key) if isinstance(times, dict) else None for key in ("ranks", "counts", "ms")]
    if not all(isinstance(part, list) for part in parts):
        return False
    ranks, counts, ms = parts
    if not all(type(n) is int for n in (*ranks, *counts)) or not (_ascend(ranks) and _ascend(counts)):
        return False
    sized = len(ranks) > 1 and ranks[0] > 0 and counts[:1] == [0] and len(ms) == len(ranks)
    return sized and all(isinstance(r, list) and len(r) == len(counts) and _are_times(r) for r in ms)


def _ascend(counts: list[int]) -> bool:
    return counts == sorted(set(counts)) and counts[-1] < 2**53


def _are_times(values: list[Any]) -> bool:
    """Whether all are numbers that a time may have: finite ones, and no whole number that no float holds."""
    return all(type(value) in (int, float) and abs(value) < _NEVER for value in values)


def _sites(table: LatencyTable) -> list[str]:
    problems = []
    for name, site in table.sites.items():
        index = site.get("curve") if isinstance(site, dict) else None
        if type(index) is not int or not 0 <= index < len(table.curves):
            problems.append(f"{name} has no curve")
        elif type(site.get("units")) is not int or site["units"] < 0:
            problems.append(f"{name} has no number of units")
        elif type(site.get("kind")) is not str:
            problems.append(f"{name} has no kind")
    return problems
