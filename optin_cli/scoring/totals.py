"""The results of items -> scores, their parts by batch, and the sketch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from optin_cli.artefacts.ranking import RankedSite
from optin_cli.artefacts.sketch import Sketch
from optin_cli.scoring.calibration import Scores
from optin_cli.scoring.methods.base import Arrays, Item, ScoringMethod
from optin_cli.structure.anatomy import BESIDE, Site


def ranked_site(site: Site, **parts: Any) -> RankedSite:
    """A site of the model as a ranking has it, with the `parts` of its scores; `score` is zero until it is combined."""
    return RankedSite(
        name=site.name,
        kind=site.kind,
        block=site.block,
        units=site.units,
        width=site.width,
        macs_per_token=site.macs_per_token,
        macs_per_pair=site.macs_per_pair,
        params_per_unit=site.params_per_unit,
        base_macs_per_token=site.base_macs_per_token,
        base_params=site.base_params,
        **{"score": np.zeros(site.units), **parts},
    )


class Totals:
    """Adds up the results of items into scores, their parts by batch, and the sketch."""

    def __init__(self, method: ScoringMethod) -> None:
        self.method = method
        self.batches = len(method.calibration)
        self.columns = {site.name: method.columns(site) for site in method.anatomy}
        self.exact = self._empty()
        self.probed = self._empty()
        self.measured = {site.name: np.zeros(site.units, dtype=bool) for site in method.anatomy}
        """[units]: not estimated alone."""
        self.beside = {site.name for site in method.anatomy if site.kind in BESIDE}
        """Sites of what is no unit: the sketch is of the others."""
        self.probes = 0
        self.rows: list[tuple[Item, Arrays]] = []

    def _empty(self) -> dict[str, _Sums]:
        return {s.name: _Sums(s.units, len(self.columns[s.name]), self.batches) for s in self.method.anatomy}

    def add(self, item: Item, arrays: Mapping[str, np.ndarray]) -> None:
        weight = self.method.weight(item)
        for name in {key.rpartition("/")[0] for key in arrays}:
            part = arrays[f"{name}/t"], arrays[f"{name}/o"]
            if item.estimates:
                self.probes = max(self.probes, item.probes[1])
                self.probed[name].add(item.batch, weight, part)
            else:  # a mean already
                units = np.array(item.units) if item.units else np.arange(len(part[1]))
                self.measured[name][units] = True
                self.exact[name].add(item.batch, weight, part, units)
        rows = {
            key: array
            for key, array in arrays.items()
            if key.endswith(("/tr", "/or")) and key.rpartition("/")[0] not in self.beside
        }
        if any(array.size for array in rows.values()):
            self.rows.append((item, rows))

    def sites(self) -> list[RankedSite]:
        """Every site with its parts: means over the batches, and each batch alone. The score is not yet set."""
        return [
            ranked_site(
                site,
                trajectory=trajectory,
                output=output,
                columns=self.columns[site.name],
                by_batch=by_batch,
            )
            for site in self.method.anatomy
            for trajectory, output, by_batch in (self._parts(site.name),)
        ]

    def _parts(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(trajectory [units, columns], output [units], by_batch [batches, units, 2]) of a site."""
        measured, probes = self.measured[name], max(1, self.probes)
        exact, probed = self.exact[name], self.probed[name]
        by_batch = np.where(measured[None, :, None], exact.by_batch, probed.by_batch / probes)
        return (
            np.where(measured[:, None], exact.trajectory, probed.trajectory / probes),
            np.where(measured, exact.output, probed.output / probes),
            by_batch[: None if self.method.batches_compare else 0].astype(np.float32),
        )

    def probing_error(self) -> float:
        """Median over units of the relative standard error that probing leaves, the larger of the two terms'.

        The scatter between the probes of a batch is probing's own; that between batches is the data's.
        """
        worst = 0.0
        for term in (0, 1):
            errors = []
            for name, sums in self.probed.items():
                if self.measured[name].all():
                    continue
                mean = sums.by_batch[..., term] / self.probes  # (batches, units)
                scatter = np.maximum(sums.squares[..., term] / self.probes - mean**2, 0) / (self.probes - 1)
                weights = self._weights()[:, None]
                total = (weights * mean).sum(0)
                error = np.sqrt((weights**2 * scatter).sum(0))
                errors.append(np.divide(error, total, out=np.zeros_like(total), where=total > 0))
            worst = max(worst, float(np.median(np.concatenate([*errors, np.zeros(0)]))) if errors else 0.0)
        return worst

    def sketch(self) -> Sketch | None:
        """The kept gradients of all batches, scaled so that their squares add up to the scores."""
        if not self.rows:
            return None
        kept = max(item.probes[1] for item, _ in self.rows)
        kept = min(kept, self.method.sketched_probes())
        self.rows.sort(key=lambda pair: (pair[0].batch, pair[0].probes))
        examples, parts = [], {"tr": {}, "or": {}}  # type: ignore[var-annotated]
        for item, arrays in self.rows:
            ids = self.method.row_examples(item.batch)
            scale = (self.method.calibration.weight(item.batch) / kept) ** 0.5
            examples += ids * (min(item.probes[1], kept) - item.probes[0])
            for key, array in arrays.items():
                name, _, part = key.rpartition("/")
                parts[part].setdefault(name, []).append(array * np.float32(scale))
        joined = {
            part: {name: np.concatenate(arrays) for name, arrays in of.items()} for part, of in parts.items()
        }
        return Sketch(np.array(examples, dtype=np.int64), joined["tr"], joined["or"])

    def _weights(self) -> np.ndarray:
        return np.array([self.method.calibration.weight(b) for b in range(self.batches)])


class _Sums:
    """Sums over items of what one engine found of a site."""

    def __init__(self, units: int, columns: int, batches: int) -> None:
        self.trajectory = np.zeros((units, columns))
        self.output = np.zeros(units)
        self.by_batch = np.zeros((batches, units, 2))
        self.squares = np.zeros((batches, units, 2))

    def add(self, batch: int, weight: float, scores: Scores, units: np.ndarray | None = None) -> None:
        where = slice(None) if units is None else units
        trajectory, output = scores
        self.trajectory[where] += weight * trajectory
        self.output[where] += weight * output
        both = np.stack([trajectory.sum(1), output], axis=-1)
        self.by_batch[batch, where] += both
        self.squares[batch, where] += both**2
