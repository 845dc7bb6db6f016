"""Is an allocation that sees the compensation better than the one that `select` finds?

    python benchmarks/allocation.py [--shared ../shared] [--models minilm-stsb,minilm-sst2,vit-cifar10]
                                    [--budgets 0.4,0.3,0.2] [--seed 0] [--work FOLDER]

The library: `select` and the refit at a dozen budgets give each sublayer as many refitted sizes. The search starts from
the sizes that `select` gives for the budget and moves MACs from one sublayer to another, a size down and a size up, as
long as the distance of the assembled model to the dense one falls on training rows that fitted nothing. Both
allocations are then refitted whole, by the defaults, and measured on the test split.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

from accuracy import CASES, Kept, distance, remembering
from cells import Case

from optin_cli.artefacts.mask import Mask
from optin_cli.compensation.plan import make_plan as plan_compensation
from optin_cli.compensation.settings import Compensation
from optin_cli.data.examples import sample
from optin_cli.data.sources import DataSpec
from optin_cli.loading.checkpoint import OpenModel, open_model
from optin_cli.measure.evaluate import evaluate, fidelity
from optin_cli.pruning.apply import PrunedModel, prune_model
from optin_cli.scoring.plan import ScoreSettings, make_plan
from optin_cli.scoring.score import existing, score
from optin_cli.selection.problem import pose
from optin_cli.selection.select import reached, select
from optin_cli.selection.settings import Request
from optin_cli.structure.anatomy import Site
from optin_cli.transforms.slicing import sharing_copy

MODELS = ("minilm-stsb", "minilm-sst2", "vit-cifar10")
LEVELS = (0.08, 0.12, 0.16, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.75, 0.9)
_LIBRARY_ROWS, _JUDGING_ROWS, _JUDGING_SEED, _FAILURES = 512, 128, 1000, 6
Levels = tuple[int, ...]
"""Of each site, which level of the library it has."""


class Library:
    """Each sublayer of a model at each level, refitted in the company of all others at that level."""

    def __init__(self, case: Case, shared: Path, work: Path, seed: int) -> None:
        spec = case.model(shared)
        assert spec is not None
        self.case, self.spec, self.seed = case, spec, seed
        self.dense = remembering(open_model(spec))
        self.sites = list(self.dense.anatomy)
        self.data = DataSpec(str(shared / case.data))
        settings = ScoreSettings(seed=seed, ranks=None)
        plan = make_plan(open_model(spec), self.data, settings)
        path = work / f"{case.name}-{plan.settings.method}-{seed}-ranks.h5"
        self.ranking = existing(path, plan, any_lambda=True) or score(plan, path)
        self.problem = pose(self.ranking, Request(flops=1.0))
        self.judging = self.rows("train", _JUDGING_ROWS, _JUDGING_SEED)
        self.masks = [select(self.ranking, Request(flops=level)) for level in LEVELS]
        self._distances: dict[Levels, float] = {}
        self.models = [self.pruned(mask, _LIBRARY_ROWS) for mask in self.masks]

    def rows(self, split: str, count: int | None, seed: int) -> Kept:
        reader = self.dense.task.reader
        found = sample(
            replace(self.data, split=split), self.dense.family.modality, count, seed, reader=reader
        )
        return Kept(found, self.dense.processor, 64, reader=reader)

    def pruned(self, mask: Mask, rows: int | None = None) -> PrunedModel:
        """Refitted on so many rows; by default as many as `apply` takes."""
        model = open_model(self.spec)
        settings = Compensation(seed=self.seed)
        settings = replace(settings, samples=rows or settings.samples)
        plan = plan_compensation(model, mask, settings, self.data, at_most=True)
        return prune_model(model, mask, plan=plan)

    def macs(self, sizes: Sequence[int]) -> float:
        """The share of the MACs."""
        keep, ranks = self._kept(sizes)
        return reached(self.problem, {name: len(units) for name, units in keep.items()}, ranks)["flops"]

    def _kept(self, sizes: Sequence[int]) -> tuple[dict[str, list[int]], dict[str, int]]:
        masks = {site.name: self.masks[size] for site, size in zip(self.sites, sizes, strict=True)}
        ranks = {name: mask.ranks[name] for name, mask in masks.items() if name in mask.ranks}
        return {name: mask.keep[name] for name, mask in masks.items()}, ranks

    def mask(self, sizes: Sequence[int]) -> Mask:
        """Of an allocation."""
        keep, ranks = self._kept(sizes)
        counts = {name: len(units) for name, units in keep.items()}
        return replace(
            self.masks[sizes[0]], keep=keep, ranks=ranks, reached=reached(self.problem, counts, ranks)
        )

    def distance(self, sizes: Levels) -> float:
        """To the dense outputs on the judging rows, times 1,000: KL or 1 - cosine."""
        if sizes not in self._distances:
            near = fidelity(self.assembled(sizes), self.judging, self.dense)
            self._distances[sizes] = 1000 * distance(near)
        return self._distances[sizes]

    def assembled(self, sizes: Levels) -> OpenModel:
        """The model whose sublayers have these sizes; what stands behind the blocks is that of the middle one."""
        base = self.models[sorted(sizes)[len(sizes) // 2]]
        module = sharing_copy(base.module)
        for site, size in zip(self.sites, sizes, strict=True):
            for path in modules_of(site):
                parent, _, name = path.rpartition(".")
                setattr(module.get_submodule(parent), name, self.models[size].module.get_submodule(path))
        return replace(base, module=module)


def modules_of(site: Site) -> list[str]:
    """What a site's size changes: its layers, and the modules that count its units or do without them."""
    owners = {path.rpartition(".")[0] for path in site.counts}
    paths = owners | {producer.path for producer in site.producers} | {site.consumer, *site.carried}
    if site.bypass:
        paths.add(site.bypass.module)
    return [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]


def searched(library: Library, start: int, budget: float) -> tuple[Levels, int]:
    """The sizes that moves from the level `start` end at, and how many models were judged.

    In a round every site is judged a level lower and a level higher. The exchanges that these promise most of are
    tried in turn, sites that have moved left alone, until some in a row make nothing better.
    """
    sizes: Levels = (start,) * len(library.sites)
    best, judged, better = library.distance(sizes), 1, True
    while better:
        steps = {
            (site, change): library.distance(other) - best
            for site, change in product(range(len(sizes)), (-1, 1))
            if (other := _moved(sizes, {site: change})) is not None
        }
        judged += len(steps)
        better, failed, moved = False, 0, set[int]()
        for exchange in _exchanges(steps):
            other = None if moved & exchange.keys() else _moved(sizes, exchange)
            if other is None or library.macs(other) > budget:
                continue
            judged += 1
            if library.distance(other) < best:
                sizes, best, better, failed = other, library.distance(other), True, 0
                moved |= exchange.keys()
            elif (failed := failed + 1) == _FAILURES:
                break
    return sizes, judged


def _moved(sizes: Levels, exchange: dict[int, int]) -> Levels | None:
    """Sizes with some changed; None where the library ends."""
    found = tuple(size + exchange.get(site, 0) for site, size in enumerate(sizes))
    return found if all(0 <= size < len(LEVELS) for size in found) else None


def _exchanges(steps: dict[tuple[int, int], float]) -> list[dict[int, int]]:
    """One site up and one or two down, as far as the parts promise a gain, those with the largest first."""
    ups = {site: cost for (site, change), cost in steps.items() if change > 0}
    downs = {site: cost for (site, change), cost in steps.items() if change < 0}
    paid = [*((site,) for site in downs), *combinations(downs, 2)]
    found = [
        (ups[up] + sum(downs[site] for site in sites), {up: 1, **dict.fromkeys(sites, -1)})
        for up, sites in product(ups, paid)
        if up not in sites
    ]
    return [exchange for promised, exchange in sorted(found, key=lambda pair: pair[0]) if promised < 0]


def compared(library: Library, budget: float) -> Iterator[str]:
    """A row for `select`'s allocation and one for the searched one."""
    tested = library.rows(library.case.test, None, 0)
    start = LEVELS.index(budget)
    began = time.perf_counter()
    sizes, judged = searched(library, start, max(budget, library.macs([start] * len(library.sites))))
    seconds = time.perf_counter() - began
    for name, chosen, spent in (
        ("select", (start,) * len(sizes), ""),
        ("searched", sizes, f"{judged} | {seconds:.0f}"),
    ):
        model = library.pruned(library.mask(chosen))
        again = 1000 * distance(fidelity(model, library.judging, library.dense))
        found = evaluate(model, tested, library.dense)
        test = 1000 * distance(found.fidelity)
        yield (
            f"| {library.macs(chosen):.3f} | {name} | {spent or '1 | 0'} | {library.distance(chosen):.2f} | "
            f"{again:.2f} | {test:.2f} | {found.metrics[library.case.metric]:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--budgets", default="0.4,0.3,0.2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="keep rankings here (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for case in (case for case in CASES if case.name in options.models.split(",")):
            began = time.perf_counter()
            library = Library(case, options.shared.resolve(), work, options.seed)
            seconds = time.perf_counter() - began
            print(f"\n{case.title}, seed {options.seed}; {len(LEVELS)} refits {seconds:.0f} s\n")
            print("| MACs | allocation | judged | search, s | distance, library | refitted | test | metric |")
            print("|---" * 8 + "|")
            for budget in map(float, options.budgets.split(",")):
                for row in compared(library, budget):
                    print(row, flush=True)


if __name__ == "__main__":
    main()
