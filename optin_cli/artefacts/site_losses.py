"""What is measured of sites of heads beside the scores of units: lower ranks, and all of a sublayer's heads at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import h5py
import numpy as np
from numpy.typing import NDArray

from optin_cli.artefacts.headers import Headers

Array = NDArray[np.float64]


@dataclass
class SiteLosses:
    """The losses of some cuts of one site, in parts as those of a unit.

    Of ranks [width]: with the first 0, 1, .. width - 1 dimensions of each head alone, in bases that have their best
    dimensions first. Of a sublayer [1]: without any of its units.
    """

    site: str
    """Name of the site of heads."""
    columns: list[int]
    """The block whose feature each trajectory column measures."""
    trajectory: Array
    """[cuts, columns]"""
    output: Array
    """[cuts]"""


def fill_losses(group: h5py.Group, losses: list[SiteLosses]) -> None:
    """Write into an empty group, one group a site."""
    for one in losses:
        inner = group.create_group(one.site)
        inner.attrs["columns"] = np.asarray(one.columns, dtype=np.int64)
        for name in ("trajectory", "output"):
            inner.create_dataset(name, data=getattr(one, name), track_times=False)


def load_losses(
    headers: Headers, group: h5py.Group, cuts: Mapping[str, int], of: Sequence[str]
) -> list[SiteLosses]:
    """Read what `fill_losses` wrote, in the order of `cuts`: site -> how many it has.

    `of` says what they are: losses of what, of each of so many what. Raises `ValueError` for what doesn't fit.
    """
    names = headers.names(group)
    if unknown := sorted(set(names) - set(cuts)):
        raise ValueError(f"it has losses of {of[0]} of {unknown[0]}, and no such site")
    found = []
    for name in (name for name in cuts if name in names):
        inner = headers.group(group, name)
        columns = headers.attribute(inner, "columns", list)
        shapes = {"trajectory": (cuts[name], len(columns)), "output": (cuts[name],)}
        trajectory, output = headers.losses(inner, shapes, f"{of[0]} of {name}", f"its {cuts[name]} {of[1]}")
        found.append(SiteLosses(name, columns, trajectory, output))
    return found
