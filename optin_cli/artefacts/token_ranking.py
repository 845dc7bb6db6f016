"""The cost of merging tokens behind one block: a part of a ranking that only vision transformers have."""

from __future__ import annotations

from dataclasses import dataclass

import h5py
import numpy as np
from numpy.typing import NDArray

from optin_cli.artefacts.headers import Headers

Array = NDArray[np.float64]


@dataclass
class RankedTokens:
    """The losses of merging tokens at one boundary, measured alone and on whole sequences before it."""

    block: int
    """Tokens are merged behind this block."""
    counts: list[int]
    """[levels] tokens merged, ascending from 1 or more."""
    columns: list[int]
    """The block whose feature each trajectory column measures."""
    trajectory: Array
    """[levels, columns], as of a unit."""
    output: Array
    """[levels], as of a unit."""


def fill_tokens(group: h5py.Group, sites: list[RankedTokens]) -> None:
    """Write into an empty group, one group a boundary."""
    for site in sites:
        one = group.create_group(str(site.block))
        for name in ("counts", "columns"):
            one.attrs[name] = np.asarray(getattr(site, name), dtype=np.int64)
        for name in ("trajectory", "output"):
            one.create_dataset(name, data=getattr(site, name), track_times=False)


def load_tokens(headers: Headers, group: h5py.Group) -> list[RankedTokens]:
    """Read what `fill_tokens` wrote, block by block; raises `ValueError` where the shapes don't fit each other."""
    found = []
    for block in sorted(headers.names(group), key=int):
        one = headers.group(group, block)
        counts, columns = (headers.attribute(one, name, list) for name in ("counts", "columns"))
        shapes = {"trajectory": (len(counts), len(columns)), "output": (len(counts),)}
        trajectory, output = headers.losses(
            one, shapes, f"merging behind block {block}", f"their {len(counts)} counts"
        )
        if counts != sorted(set(counts)) or min(counts, default=1) < 1:
            raise ValueError(f"the counts of tokens merged behind block {block} do not ascend from 1")
        found.append(RankedTokens(int(block), counts, columns, trajectory, output))
    return found
