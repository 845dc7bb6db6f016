"""Backward passes from the features of a stratum, and the sums of what they find."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from optin_cli.scoring.calibration import measured_blocks
from optin_cli.scoring.graphs import Graph
from optin_cli.structure.anatomy import Site


@dataclass
class ProbeSums:
    """Sums over the probes of one batch, site name -> array."""

    trajectory: dict[str, np.ndarray]
    """(units, columns): squares summed over the examples; columns as `measured_blocks` says. Those of a stratum have
    equal parts of its sum."""
    output: dict[str, np.ndarray]
    """(units,)"""
    trajectory_rows: dict[str, np.ndarray]
    """(sketched probes * examples, units): gradients, summed over the features."""
    output_rows: dict[str, np.ndarray]
    """(sketched probes * examples, units)"""


@dataclass(frozen=True)
class Pass:
    """A backward pass from the features of a stratum."""

    blocks: tuple[int, ...]
    sites: list[Site]
    """Those with one of the blocks in their trajectory."""
    outside: dict[int, list[Site]]
    """Block -> those of the sites in whose trajectory it is not; its feature may depend on them all the same."""

    @classmethod
    def of(cls, stratum: Sequence[int], sites: Sequence[Site], columns: Mapping[str, Sequence[int]]) -> Pass:
        concerned = [site for site in sites if set(stratum).intersection(columns[site.name])]
        blocks = tuple(z for z in stratum if any(z in columns[site.name] for site in concerned))
        outside = {z: [site for site in concerned if z not in columns[site.name]] for z in blocks}
        return cls(blocks, concerned, {z: some for z, some in outside.items() if some})

    def gradients(
        self, graph: Graph, unit: Mapping[int, Tensor], seeds: Mapping[int, Tensor]
    ) -> list[Tensor]:
        """d(sum over the blocks of <seed, unit rows>)/dm_u, each site's without the blocks outside its trajectory."""
        joint = [unit[z] for z in self.blocks], [seeds[z] for z in self.blocks]
        found = graph.gradients(*joint, self.sites)
        place = {site.name: i for i, site in enumerate(self.sites)}
        for z, some in self.outside.items():
            parts = graph.gradients([unit[z]], [seeds[z]], some, partly=True)
            for site, own in zip(some, parts, strict=True):
                found[place[site.name]] -= own
        return found


class Tally:
    """Collects the gradients of a batch where they are: a copy to the host would wait for all that a GPU has to do."""

    def __init__(self, sites: Sequence[Site], examples: int, depth: int, sketched: int) -> None:
        self.sites = sites
        self.columns = {site.name: measured_blocks(site, depth) for site in sites}
        self.kept = sketched, examples
        """Probes whose gradients are kept, and how many rows each."""
        self.trajectory: dict[str, _Sums] = {}
        self.output: dict[str, _Sums] = {}

    def add_features(self, one: Pass, gradients: Sequence[Tensor], place: tuple[int, int]) -> None:
        """Add gradients (probes, examples, units); `place` is the number of the first probe and example of them."""
        for site, gradient in zip(one.sites, gradients, strict=True):
            columns = self.columns[site.name]
            if site.name not in self.trajectory:
                self.trajectory[site.name] = _Sums(site.units, len(columns), self.kept, gradient.device)
            own = [columns.index(z) for z in one.blocks if z in columns]
            self.trajectory[site.name].add(own, gradient, place)

    def add_output(self, sites: Sequence[Site], gradients: Sequence[Tensor], place: tuple[int, int]) -> None:
        for site, gradient in zip(sites, gradients, strict=True):
            if site.name not in self.output:
                self.output[site.name] = _Sums(site.units, 1, self.kept, gradient.device)
            self.output[site.name].add([0], gradient, place)

    @property
    def result(self) -> ProbeSums:
        for site in self.sites:  # a site may have no columns, and none of its blocks be probed
            columns = len(self.columns[site.name])
            self.trajectory.setdefault(site.name, _Sums(site.units, columns, self.kept, torch.device("cpu")))
        trajectory = {site.name: self.trajectory[site.name] for site in self.sites}
        output = {site.name: self.output[site.name] for site in self.sites}
        return ProbeSums(
            trajectory={name: sums.squares.cpu().numpy() for name, sums in trajectory.items()},
            output={name: sums.squares[:, 0].cpu().numpy() for name, sums in output.items()},
            trajectory_rows={
                name: sums.rows.flatten(0, 1).cpu().numpy() for name, sums in trajectory.items()
            },
            output_rows={name: sums.rows.flatten(0, 1).cpu().numpy() for name, sums in output.items()},
        )


class _Sums:
    """Of the gradients of one site: squares summed over the examples, and the first rows, summed over the columns."""

    def __init__(self, units: int, columns: int, kept: tuple[int, int], device: torch.device) -> None:
        self.squares = torch.zeros(units, columns, dtype=torch.float64, device=device)
        self.rows = torch.zeros(*kept, units, device=device)

    def add(self, columns: Sequence[int], gradient: Tensor, place: tuple[int, int]) -> None:
        """Add float32 gradients (probes, examples, units), the first of which is of probe and example `place`.

        The columns get equal parts of their squares.
        """
        squares = gradient.flatten(0, 1).double().square().sum(0) / len(columns)
        self.squares[:, list(columns)] += squares[:, None]
        probe, example = place
        if probe < len(self.rows):
            kept = gradient[: len(self.rows) - probe]
            self.rows[probe : probe + len(kept), example : example + kept.shape[1]] += kept
