"""Items of work -> arrays, and arrays -> scores. Engines don't know about batches' weights, files or processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from optin_cli.artefacts.sketch import Sketch
from optin_cli.artefacts.tokens import RankedTokens
from optin_cli.scoring.ablation import Ablation
from optin_cli.scoring.calibration import Scores
from optin_cli.scoring.curvature import curvature
from optin_cli.scoring.fisher import fisher
from optin_cli.scoring.knowledge import knowledge
from optin_cli.scoring.plan import Item, Plan
from optin_cli.scoring.reference import Reference
from optin_cli.scoring.tokens import TokenLosses, boundaries, boundary_name, columns

Arrays = dict[str, np.ndarray]
"""An item's result: `<site>/<part>` -> array. Parts: `t`, `o` (scores), `tr`, `or` (rows of the sketch)."""
Told = Callable[[float], None]
"""Called with the work just done."""


class Worker:
    """Runs items, keeping the recorded pass of the batch at hand."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.recorded: tuple[int, Ablation] | None = None
        self.reference: tuple[int, Reference] | None = None
        self.tokens: tuple[int, TokenLosses] | None = None

    def run(self, item: Item, tell: Told = lambda _: None) -> Arrays:
        engines = {
            "ablation": self._ablation,
            "curvature": self._curvature,
            "fisher": self._fisher,
            "knowledge": self._knowledge,
            "reference": self._reference,
            "tokens": self._tokens,
        }
        return engines[item.engine](item, tell)

    def _ablation(self, item: Item, tell: Told) -> Arrays:
        if self.recorded is None or self.recorded[0] != item.batch:
            reduced = self.plan.settings.precision == "reduced"
            self.recorded = item.batch, Ablation(self.plan.calibration, item.batch, reduced)
        site = self.plan.model.anatomy[item.site]
        each = item.work / len(item.units)
        trajectory, output = self.recorded[1].score(site, np.array(item.units), lambda n: tell(n * each))
        return {f"{item.site}/t": trajectory, f"{item.site}/o": output}

    def _curvature(self, item: Item, tell: Told) -> Arrays:
        self.recorded = None  # its memory is needed
        # heads that ablation scores are probed too: the sketch is of all units
        sketched = self.plan.sketched_probes()
        sites = list(self.plan.model.anatomy) if sketched else self.plan.scored_by("curvature")
        probes = range(*item.probes)
        each = item.work / len(probes)
        found = curvature(
            self.plan.calibration, item.batch, sites, probes, sketched, lambda n: tell(n * each)
        )
        parts = {"t": found.trajectory, "o": found.output}
        if sketched > probes.start:
            parts |= {"tr": found.trajectory_rows, "or": found.output_rows}
        return _named(parts)

    def _fisher(self, item: Item, _: Told) -> Arrays:
        plan = self.plan
        assert plan.labels is not None
        found = fisher(
            plan.calibration, item.batch, list(plan.model.anatomy), plan.labels, plan.settings.per_batch
        )
        nothing = {name: np.zeros((len(output), 0)) for name, output in found.output.items()}
        parts = {"t": nothing, "o": found.output}
        if plan.settings.sketch_rows:
            parts["or"] = found.rows
        return _named(parts)

    def _knowledge(self, item: Item, _: Told) -> Arrays:
        plan = self.plan
        found = knowledge(
            plan.calibration,
            item.batch,
            list(plan.model.anatomy),
            range(*item.probes),
            plan.sketched_probes(),
        )
        parts = {"t": found.representational, "o": found.predictive}
        if plan.sketched_probes():
            parts["or"] = found.rows
        return _named(parts)

    def _reference(self, item: Item, tell: Told) -> Arrays:
        if self.reference is None or self.reference[0] != item.batch:
            reduced = self.plan.settings.precision == "reduced"
            self.reference = item.batch, Reference(self.plan.calibration, item.batch, reduced)
        site, each = self.plan.model.anatomy[item.site], item.work / len(item.units)
        trajectory, output = self.reference[1].score(site, np.array(item.units), lambda n: tell(n * each))
        return {f"{item.site}/t": trajectory, f"{item.site}/o": output}

    def _tokens(self, item: Item, _: Told) -> Arrays:
        self.recorded = None  # its memory is needed
        if self.tokens is None or self.tokens[0] != item.batch:
            self.tokens = item.batch, TokenLosses(self.plan.calibration, item.batch)
        (block,) = item.units
        trajectory, output = self.tokens[1].score(block)
        return {f"{item.site}/t": trajectory, f"{item.site}/o": output}


def _named(parts: Mapping[str, Mapping[str, np.ndarray]]) -> Arrays:
    return {f"{name}/{part}": array for part, arrays in parts.items() for name, array in arrays.items()}


class Totals:
    """Adds up the results of items into scores, their parts by batch, and the sketch."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.batches = len(plan.calibration)
        depth = len(plan.model.anatomy.blocks)
        self.columns = {s.name: plan.method.columns(s, depth) for s in plan.model.anatomy}
        self.exact = {
            s.name: _Sums(s.units, len(self.columns[s.name]), self.batches) for s in plan.model.anatomy
        }
        self.probed = {
            s.name: _Sums(s.units, len(self.columns[s.name]), self.batches) for s in plan.model.anatomy
        }
        self.measured = {s.name: np.zeros(s.units, dtype=bool) for s in plan.model.anatomy}
        """[units]: not estimated by curvature alone."""
        self.merging = {
            boundary_name(block): _Sums(len(plan.token_levels), len(columns(block, depth)), self.batches)
            for block in (boundaries(plan.model.anatomy) if plan.settings.tokens else ())
        }
        """What merging tokens costs, boundary by boundary."""
        self.probes = 0
        self.rows: list[tuple[Item, Arrays]] = []

    def add(self, item: Item, arrays: Mapping[str, np.ndarray]) -> None:
        weight = self.plan.weight(item)
        for name in {key.rpartition("/")[0] for key in arrays}:
            part = arrays[f"{name}/t"], arrays[f"{name}/o"]
            if item.engine == "tokens":
                self.merging[name].add(item.batch, weight, part)
            elif item.engine == "curvature":
                self.probes = max(self.probes, item.probes[1])
                self.probed[name].add(item.batch, weight, part)
            else:  # a mean already
                units = np.array(item.units) if item.units else np.arange(len(part[1]))
                self.measured[name][units] = True
                self.exact[name].add(item.batch, weight, part, units)
        rows = {key: array for key, array in arrays.items() if key.endswith(("/tr", "/or"))}
        if any(array.size for array in rows.values()):
            self.rows.append((item, rows))

    def parts(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(trajectory [units, columns], output [units], by_batch [batches, units, 2]) of a site."""
        measured, probes = self.measured[name], max(1, self.probes)
        exact, probed = self.exact[name], self.probed[name]
        by_batch = np.where(measured[None, :, None], exact.by_batch, probed.by_batch / probes)
        if self.plan.settings.method == "reference":  # one batch is all it looks at
            by_batch = by_batch[:0]
        return (
            np.where(measured[:, None], exact.trajectory, probed.trajectory / probes),
            np.where(measured, exact.output, probed.output / probes),
            by_batch.astype(np.float32),
        )

    def token_sites(self) -> list[RankedTokens]:
        """What merging tokens costs behind each block; none if that was not asked for."""
        depth, counts = len(self.plan.model.anatomy.blocks), self.plan.token_levels
        return [
            RankedTokens(block, list(counts), columns(block, depth), sums.trajectory, sums.output)
            for block, sums in enumerate(self.merging.values())
        ]

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
        kept = min(kept, self.plan.sketched_probes())
        self.rows.sort(key=lambda pair: (pair[0].batch, pair[0].probes))
        examples, parts = [], {"tr": {}, "or": {}}  # type: ignore[var-annotated]
        for item, arrays in self.rows:
            ids = self.plan.row_examples(item.batch)
            scale = (self.plan.calibration.weight(item.batch) / kept) ** 0.5
            examples += ids * (min(item.probes[1], kept) - item.probes[0])
            for key, array in arrays.items():
                name, _, part = key.rpartition("/")
                parts[part].setdefault(name, []).append(array * np.float32(scale))
        joined = {
            part: {name: np.concatenate(arrays) for name, arrays in of.items()} for part, of in parts.items()
        }
        return Sketch(np.array(examples, dtype=np.int64), joined["tr"], joined["or"])

    def _weights(self) -> np.ndarray:
        return np.array([self.plan.calibration.weight(b) for b in range(self.batches)])


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
