"""The cost of lower ranks of heads: a part of a ranking, of models whose heads can be cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import h5py
import numpy as np
from numpy.typing import NDArray

from optin_cli.artefacts.headers import Headers

Array = NDArray[np.float64]


class Sized(Protocol):
    """What a site of a ranking says of its heads."""

    name: str
    width: int


@dataclass
class RankedRanks:
    """The losses of cutting all heads of one site to a rank, in bases that have their best dimensions first."""

    site: str
    """Name of the site of heads."""
    columns: list[int]
    """The block whose feature each trajectory column measures."""
    trajectory: Array
    """[width, columns], as of a unit: the loss with the first 0, 1, .. width - 1 dimensions of each head alone."""
    output: Array
    """[width], as of a unit."""


def fill_ranks(group: h5py.Group, ranks: list[RankedRanks]) -> None:
    """Write into an empty group, one group a site."""
    for one in ranks:
        inner = group.create_group(one.site)
        inner.attrs["columns"] = np.asarray(one.columns, dtype=np.int64)
        for name in ("trajectory", "output"):
            inner.create_dataset(name, data=getattr(one, name), track_times=False)


def load_ranks(headers: Headers, group: h5py.Group, sites: Sequence[Sized]) -> list[RankedRanks]:
    """Read what `fill_ranks` wrote, in the order of `sites`; raises `ValueError` for what doesn't fit them."""
    widths = {site.name: site.width for site in sites}
    names = headers.names(group)
    if unknown := sorted(set(names) - set(widths)):
        raise ValueError(f"it has losses of ranks of {unknown[0]}, and no such site")
    found = []
    for name in (name for name in widths if name in names):
        inner = headers.group(group, name)
        columns = headers.attribute(inner, "columns", list)
        shapes = {"trajectory": (widths[name], len(columns)), "output": (widths[name],)}
        trajectory, output = headers.losses(
            inner, shapes, f"ranks of {name}", f"its {widths[name]} dimensions"
        )
        found.append(RankedRanks(name, columns, trajectory, output))
    return found
