"""Does an allocation that is searched for by the real divergence beat the one that `select` solves?

    python benchmarks/allocation.py [--shared ../shared] [--models minilm-stsb,minilm-sst2,vit-cifar10]
                                    [--budgets 0.4,0.3,0.2] [--seeds 0,1,2] [--cells benchmarks/allocation]
    python benchmarks/allocation.py --report

The search starts from the mask of `select`. For each site a library of refitted widths is made: one Gram matrix of what
its consumer reads in the dense model serves all of them, with a Cholesky factor each. A candidate puts the refitted
consumers of all sites together; its divergence from the dense outputs is measured on training rows that nothing was
fitted to. A move takes some MACs from one site and gives them to another; it is made if the divergence falls, the
best expected ones first, in ever smaller amounts. Then both masks go through the same `apply`, and are measured on the
test split. Units of a site go by their order in the ranking in both, and heads stay whole.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy import CASES, Kept
from cells import SEEDS, Case, Cells
from torch import Tensor, nn

from optin_cli.artefacts.mask import Mask
from optin_cli.artefacts.ranking import Ranking
from optin_cli.compensation.plan import make_plan as plan_compensation
from optin_cli.compensation.settings import Compensation
from optin_cli.data.batches import Batches
from optin_cli.data.examples import sample
from optin_cli.data.sources import DataSpec
from optin_cli.loading.checkpoint import OpenModel, open_model
from optin_cli.loading.from_module import copy_of
from optin_cli.measure.evaluate import evaluate
from optin_cli.pruning.apply import prune_model
from optin_cli.scoring.plan import ScoreSettings, make_plan
from optin_cli.scoring.score import existing, score
from optin_cli.selection.problem import Problem, pose
from optin_cli.selection.select import reached, select
from optin_cli.selection.settings import Request
from optin_cli.structure.anatomy import Site
from optin_cli.structure.layers import like_weight, matrix

MODELS = ("minilm-stsb", "minilm-sst2", "vit-cifar10")
BUDGETS = (0.4, 0.3, 0.2)
_RIDGE = 1e-2
_AMOUNTS = (0.08, 0.04, 0.02, 0.01)
"""That one move shifts, as shares of the budget."""
_TRIED = 6
"""Moves that are tried after one look at all sites."""


class Library:
    """Refitted consumers of every site, for any units kept: GRAIL's fit, from one Gram matrix a site."""

    def __init__(self, model: OpenModel, batches: Batches) -> None:
        self.sites = {site.name: site for site in model.anatomy}
        self.layers = {name: model.module.get_submodule(site.consumer) for name, site in self.sites.items()}
        self.grams: dict[str, Tensor] = {}
        self.made: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        handles = [
            layer.register_forward_pre_hook(self._summing(name)) for name, layer in self.layers.items()
        ]
        with torch.inference_mode():
            for batch in batches:
                self.valid = batch.valid
                model.output(batch.inputs)
        for handle in handles:
            handle.remove()

    def _summing(self, name: str) -> Any:
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0]
            whole = self.valid is None or self.valid.shape != rows.shape[:2]
            rows = (rows.flatten(0, -2) if whole else rows[self.valid]).double()
            rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], 1)
            gram = rows.T @ rows
            self.grams[name] = gram + self.grams[name] if name in self.grams else gram

        return add

    def consumer(self, name: str, units: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(weight, bias) of the consumer that gives the most of the dense output by `units` alone, zeros elsewhere."""
        key = name, len(units)
        if key not in self.made:
            self.made[key] = self._fitted(self.sites[name], self.layers[name], units)
        return self.made[key]

    def _fitted(self, site: Site, layer: Any, units: Sequence[int]) -> tuple[Tensor, Tensor]:
        weight, gram = matrix(layer).detach().double(), self.grams[site.name]
        count = gram[-1, -1]
        mean = gram[-1, :-1] / count
        centred = gram[:-1, :-1] - count * torch.outer(mean, mean)
        kept = (torch.tensor(units)[:, None] * site.width + torch.arange(site.width)).flatten().long()
        new = torch.zeros_like(weight)
        if len(kept):
            within = centred[kept][:, kept]
            ridge = _RIDGE * within.diagonal().mean()
            wanted = centred[kept] @ weight.T + ridge * weight[:, kept].T
            within.diagonal().add_(ridge)
            new[:, kept] = torch.cholesky_solve(wanted, torch.linalg.cholesky(within)).T
        bias = layer.bias.detach().double() + (weight - new) @ mean
        return like_weight(layer, new).to(layer.weight.dtype), bias.to(layer.weight.dtype)


class Candidates:
    """The dense model with refitted consumers put together, and how far it is from the dense one."""

    def __init__(self, model: OpenModel, problem: Problem, library: Library, held: Kept) -> None:
        self.model, self.problem, self.library, self.held = model, problem, library, held
        self.module = copy.deepcopy(model.module)
        with torch.inference_mode():
            self.dense = [model.output(batch.inputs) for batch in held]
        self.seen: dict[tuple[int, ...], float] = {}

    def loss(self, counts: Sequence[int]) -> float:
        """Mean divergence: KL of classifiers, 1 - cosine of embeddings."""
        key = tuple(map(int, counts))
        if key not in self.seen:
            for name, units in self.problem.keep(list(key)).items():
                layer = self.module.get_submodule(self.library.sites[name].consumer)
                layer.weight.data, layer.bias.data = self.library.consumer(name, units)
            parts = []
            with torch.inference_mode():
                for batch, dense in zip(self.held, self.dense, strict=True):
                    parts.append(divergence(self.model.output(batch.inputs, self.module), dense, self.model))
            self.seen[key] = float(torch.cat(parts).mean())
        return self.seen[key]


def divergence(ours: Tensor, dense: Tensor, model: OpenModel) -> Tensor:
    """Of each example."""
    if model.task.name == "embedding":
        return 1 - torch.cosine_similarity(ours, dense, dim=-1)
    logs, wanted = ours.log_softmax(-1), dense.log_softmax(-1)
    return (wanted.exp() * (wanted - logs)).sum(-1)


def searched(candidates: Candidates, start: Sequence[int]) -> tuple[list[int], dict[str, float]]:
    """Improve the numbers of units within the same budget; returns them, and what was found."""
    problem = candidates.problem
    sizes, capacity = problem.site_sizes, float(problem.capacities[0])
    at = [int(np.searchsorted(s.counts, c)) for s, c in zip(sizes, start, strict=True)]

    def cost(site: int, index: int) -> float:
        return float(sizes[site].costs[0, index])

    def counts(indices: Sequence[int]) -> list[int]:
        return [int(s.counts[i]) for s, i in zip(sizes, indices, strict=True)]

    def shifted(index: int, site: int, by: float) -> int:
        """The size of a site that costs `by` more, or less, than now; rounded to the cheaper one."""
        return int(np.searchsorted(sizes[site].costs[0], cost(site, index) + by + 1e-9, side="right")) - 1

    best = first = candidates.loss(counts(at))
    moves = 0
    for amount in (share * capacity for share in _AMOUNTS):
        while True:
            losses: dict[tuple[str, int], float] = {}
            for site in range(len(sizes)):
                for way, by in (("down", -amount), ("up", amount)):
                    index = max(0, shifted(at[site], site, by))
                    if index != at[site]:
                        losses[way, site] = candidates.loss(counts([*at[:site], index, *at[site + 1 :]]))
            pairs = sorted(
                (losses["down", a] + losses["up", b], a, b)
                for way, a in losses if way == "down" for also, b in losses if also == "up" and a != b
            )  # fmt: skip
            for _, a, b in pairs[:_TRIED]:
                there = list(at)
                there[a] = max(0, shifted(at[a], a, -amount))
                room = capacity - sum(cost(s, i) for s, i in enumerate(there))
                there[b] = shifted(at[b], b, room)
                loss = candidates.loss(counts(there))
                if loss < best:
                    at, best, moves = there, loss, moves + 1
                    break
            else:
                break
    found = {"before": first, "after": best, "moves": moves, "candidates": len(candidates.seen)}
    return counts(at), found


class Runner:
    """One case: the dense model, its test rows, its rankings."""

    def __init__(self, case: Case, shared: Path, work: Path) -> None:
        spec = case.model(shared)
        assert spec is not None
        self.case, self.work, self.spec, self.data = case, work, spec, DataSpec(str(shared / case.data))
        self.dense = open_model(spec)
        self.tested = self._rows(case.test, None, 0)

    def _rows(self, split: str, count: int | None, seed: int) -> Kept:
        reader = self.dense.task.reader
        rows = sample(replace(self.data, split=split), self.dense.family.modality, count, seed, reader=reader)
        return Kept(rows, self.dense.processor, 64, reader=reader)

    def ranking(self, seed: int) -> Ranking:
        path = self.work / f"{self.case.name}-{seed}.h5"
        plan = make_plan(open_model(self.spec), self.data, ScoreSettings(seed=seed, ranks=False))
        return existing(path, plan, any_lambda=True) or score(plan, path)

    def cells(self, seed: int, budgets: Sequence[float]) -> Iterator[tuple[str, dict[str, Any]]]:
        ranking = self.ranking(seed)
        library = Library(self.dense, self._rows("train", 512, seed))
        held = self._rows("train", 256, 1000 + seed)
        for budget in budgets:
            request = Request(flops=budget, feature_weights="auto")
            mask, problem = select(ranking, request), pose(ranking, request)
            began = time.perf_counter()
            candidates = Candidates(self.dense, problem, library, held)
            counts, found = searched(candidates, [len(mask.keep[site.name]) for site in problem.sites])
            found["seconds"] = time.perf_counter() - began
            yield f"select/{budget}/{seed}", self._measured(mask, seed)
            keep = problem.keep(counts)
            sizes = {name: len(units) for name, units in keep.items()}
            other = replace(mask, keep=keep, reached=reached(problem, sizes))
            yield f"search/{budget}/{seed}", {**self._measured(other, seed), "search": found}

    def _measured(self, mask: Mask, seed: int) -> dict[str, Any]:
        settings = Compensation(seed=seed)
        plan = plan_compensation(self.dense, mask, settings, self.data, at_most=True)
        found = evaluate(prune_model(copy_of(self.dense), mask, plan=plan), self.tested, self.dense)
        kept = {name: len(units) for name, units in mask.keep.items()}
        metrics = found.metrics | found.fidelity
        return {
            "metrics": metrics,
            "dense": found.baseline_metrics,
            "flops": mask.reached["flops"],
            "kept": kept,
        }


def report(folder: Path, cases: Sequence[Case]) -> None:
    """A table: each budget's metric and divergence with both allocations, and in how many seeds the search is ahead."""
    print(
        "| model | MACs kept | seeds | select | search | select, distance | search, distance | better in | seconds |"
    )
    print("|---" * 9 + "|")
    for case in cases:
        cells = Cells(folder, case).found
        for budget in sorted({float(key.split("/")[1]) for key in cells}, reverse=True):
            pairs = [
                (cells[f"select/{budget}/{seed}"], cells[f"search/{budget}/{seed}"])
                for seed in SEEDS
                if f"search/{budget}/{seed}" in cells
            ]
            metric = [
                _mean(cell["metrics"][case.metric] for cell in side) for side in zip(*pairs, strict=True)
            ]
            far = [_mean(_distance(cell["metrics"]) for cell in side) for side in zip(*pairs, strict=True)]
            ahead = sum(_distance(b["metrics"]) < _distance(a["metrics"]) for a, b in pairs)
            took = _mean(b["search"]["seconds"] for _, b in pairs)
            print(
                f"| {case.title} | {budget} | {len(pairs)} | {metric[0]:.2f} | {metric[1]:.2f} | {far[0]:.4f} | "
                f"{far[1]:.4f} | {ahead} | {took:.0f} |"
            )


def _distance(metrics: Mapping[str, float]) -> float:
    return metrics["kl"] if "kl" in metrics else 1 - metrics["cosine"] / 100


def _mean(values: Any) -> float:
    return statistics.mean(values)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--cells", type=Path, default=Path("benchmarks/allocation"))
    parser.add_argument("--work", type=Path, help="keep rankings here (default: a temporary folder)")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    cases = [case for case in CASES if case.name in options.models.split(",")]
    if not options.report:
        with tempfile.TemporaryDirectory() as temporary:
            work = options.work or Path(temporary)
            work.mkdir(parents=True, exist_ok=True)
            for seed in map(int, options.seeds.split(",")):
                for case in cases:
                    cells = Cells(options.cells, case)
                    budgets = [float(b) for b in options.budgets.split(",")]
                    left = [b for b in budgets if f"search/{b}/{seed}" not in cells.found]
                    if left:
                        for key, cell in Runner(case, options.shared.resolve(), work).cells(seed, left):
                            cells.put(key, cell)
                            shown = {k: round(v, 4) for k, v in cell["metrics"].items()}
                            print(
                                json.dumps({case.name: key, **shown, **cell.get("search", {})}),
                                file=sys.stderr,
                            )
    report(options.cells, cases)


if __name__ == "__main__":
    main()
