"""Would a sublayer be better replaced by a linear map than by a few of its own units?

    python benchmarks/linear_maps.py [--shared ../shared] [--models minilm-stsb,minilm-sst2,vit-cifar10] [--rows 2048]

Each attention and FFN in turn, all else dense, is replaced by its mean output, by a linear map of what it reads (d x d,
and of a quarter of that rank at half of the MACs), and by its best units for as many MACs as the map, with their
consumer refitted. Maps and consumers are fitted on training rows; the distance to the dense outputs (KL, or 1 - cosine)
is measured on other ones. Then the time of one example and of 32, with all FFNs replaced alike.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy import CASES, Kept, distance, remembering
from cells import Case
from torch import Tensor, nn
from torch.nn import functional as F

from optin_cli.compensation.least_squares import Moments
from optin_cli.data.examples import sample
from optin_cli.data.sources import DataSpec
from optin_cli.loading.checkpoint import OpenModel, open_model
from optin_cli.measure.evaluate import fidelity
from optin_cli.scoring.plan import ScoreSettings, make_plan
from optin_cli.scoring.score import existing, score
from optin_cli.selection.problem import pose
from optin_cli.selection.settings import Request
from optin_cli.structure.anatomy import Site
from optin_cli.structure.layers import matrix
from optin_cli.transforms.slicing import kept_features, slice_model

MODELS = ("minilm-stsb", "minilm-sst2", "vit-cifar10")
_MAP_RIDGE, _UNIT_RIDGE = 1e-3, 1e-2
_TURNS = 60

Map = tuple[Tensor, Tensor]
"""(weight [outputs, inputs], bias [outputs])"""


class Sublayers:
    """Each attention and FFN of the dense model: what it reads, what its consumer reads, what it gives."""

    def __init__(self, model: OpenModel, rows: Kept) -> None:
        self.model = model
        self.sites = list(model.anatomy)
        self.first = {site.name: model.module.get_submodule(site.producers[0].path) for site in self.sites}
        self.last = {site.name: model.module.get_submodule(site.consumer) for site in self.sites}
        self.whole: dict[str, Moments] = {}
        """Of what a sublayer reads and gives."""
        self.units: dict[str, Moments] = {}
        """Of what its consumer reads and gives."""
        self._sum(rows)

    def _sum(self, rows: Kept) -> None:
        read: dict[str, Tensor] = {}
        valid: Tensor | None = None

        def real(value: Tensor) -> Tensor:
            """The rows of real tokens."""
            whole = valid is None or valid.shape != value.shape[:2]
            return (value.flatten(0, -2) if whole else value[valid]).double()

        def add(sums: dict[str, Moments], name: str, x: Tensor, y: Tensor) -> None:
            if name not in sums:
                sums[name] = Moments.zeros(x.shape[1], y.shape[1])
            sums[name].add(x, y, x.new_ones(len(x)))

        def reads(name: str) -> Any:
            return lambda _, args: read.__setitem__(name, real(args[0]))

        def gives(name: str) -> Any:
            def gave(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                add(self.whole, name, read[name], real(output))
                add(self.units, name, real(args[0]), real(output))

            return gave

        with ExitStack() as stack, torch.inference_mode():
            for site in self.sites:
                stack.callback(self.first[site.name].register_forward_pre_hook(reads(site.name)).remove)
                stack.callback(self.last[site.name].register_forward_hook(gives(site.name)).remove)
            for batch in rows:
                valid = batch.valid
                self.model.output(batch.inputs)

    def linear(self, site: Site) -> Map:
        """The best map d x d in place of a sublayer."""
        moments = self.whole[site.name]
        nothing = torch.zeros(len(moments.ee), len(moments.gram) - 1, dtype=torch.float64)
        return fitted(moments, nothing, torch.arange(nothing.shape[1]), _MAP_RIDGE)

    def consumer(self, site: Site, units: list[int]) -> Map:
        """The consumer that gives the most of the dense output by these units alone; zeros elsewhere."""
        dense = matrix(self.last[site.name]).detach().double()
        return fitted(self.units[site.name], dense, kept_features(site, torch.tensor(units)), _UNIT_RIDGE)

    @contextmanager
    def replaced(self, site: Site, found: Map, units: bool) -> Iterator[None]:
        """Within the context, a sublayer gives this map of what it reads; with `units`, of what its consumer reads."""
        read: list[Tensor] = []
        weight, bias = (part.float() for part in found)
        reader = self.last if units else self.first

        def gives(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            return F.linear(read.pop(), weight, bias).reshape(output.shape)

        with ExitStack() as stack:
            pre = reader[site.name].register_forward_pre_hook(lambda _, args: read.append(args[0]))
            stack.callback(pre.remove)
            stack.callback(self.last[site.name].register_forward_hook(gives).remove)
            yield


def fitted(moments: Moments, start: Tensor, kept: Tensor, ridge: float) -> Map:
    """The regression of outputs on the inputs `kept`, pulled toward `start` by a ridge (of the mean diagonal)."""
    mean, given = moments.gram[-1, :-1] / moments.rows, moments.cross[-1] / moments.rows
    gram = (moments.gram[:-1, :-1] - moments.rows * torch.outer(mean, mean))[kept][:, kept]
    cross = (moments.cross[:-1] - moments.rows * torch.outer(mean, given))[kept]
    pull = ridge * gram.diagonal().mean()
    gram.diagonal().add_(pull)
    weight = torch.zeros_like(start)
    weight[:, kept] = torch.cholesky_solve(cross + pull * start[:, kept].T, torch.linalg.cholesky(gram)).T
    return weight, given - weight @ mean


def of_rank(found: Map, rank: int, mean: Tensor) -> Map:
    """The map with its largest singular values alone; what it gives for the mean input stays."""
    weight, bias = found
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    low = (u[:, :rank] * s[:rank]) @ v[:rank]
    return low, bias + (weight - low) @ mean


class Comparison:
    """One model."""

    def __init__(self, case: Case, shared: Path, work: Path, count: int) -> None:
        spec = case.model(shared)
        assert spec is not None
        self.model, self.baseline = open_model(spec), remembering(open_model(spec))
        self.data = DataSpec(str(shared / case.data))
        self.sublayers = Sublayers(self.model, self._rows(count, 0))
        self.held = self._rows(256, 1000)
        path = work / f"{case.name}-0.h5"
        plan = make_plan(self.baseline, self.data, ScoreSettings(ranks=False))
        self.problem = pose(existing(path, plan, any_lambda=True) or score(plan, path), Request(flops=0.3))

    def _rows(self, count: int, seed: int) -> Kept:
        reader = self.model.task.reader
        data = replace(self.data, split="train")
        found = sample(data, self.model.family.modality, count, seed, reader=reader)
        return Kept(found, self.model.processor, 64, reader=reader)

    def units(self, site: Site) -> list[int]:
        """The best units for at least as many MACs as a map d x d."""
        place = next(i for i, ranked in enumerate(self.problem.sites) if ranked.name == site.name)
        ranked, tokens = self.problem.sites[place], self.problem.tokens
        wanted = len(self.sublayers.whole[site.name].ee) ** 2 * tokens
        count = next(n for n in range(1, site.units + 1) if ranked.macs(tokens, n) >= wanted)
        order = np.argsort(-self.problem.scores[place], kind="stable")
        return sorted(order[:count].tolist())

    def distance(self, site: Site, found: Map, *, units: bool = False) -> float:
        """To the dense outputs, with one sublayer replaced."""
        with self.sublayers.replaced(site, found, units):
            return distance(fidelity(self.model, self.held, self.baseline))

    def rows(self) -> Iterator[str]:
        for site in self.sublayers.sites:
            moments = self.sublayers.whole[site.name]
            mean, given = moments.gram[-1, :-1] / moments.rows, moments.cross[-1] / moments.rows
            linear, units = self.sublayers.linear(site), self.units(site)
            distances = [
                self.distance(site, (torch.zeros_like(linear[0]), given)),
                self.distance(site, of_rank(linear, len(given) // 4, mean)),
                self.distance(site, linear),
                self.distance(site, self.sublayers.consumer(site, units), units=True),
            ]
            told = " | ".join(f"{1000 * found:.2f}" for found in distances)
            yield f"| {site.block} | {site.kind} | {told} | {len(units)} of {site.units} |"

    def milliseconds(self, size: int) -> dict[str, float]:
        """Of a forward with all FFNs replaced alike: medians, one model after the other in every turn."""
        sites = [site for site in self.sublayers.sites if site.kind == "neurons"]
        batch = next(iter(self.held)).head(size)
        modules: dict[str, nn.Module] = {"dense": self.model.module}
        for name, count in (("as many MACs in neurons", None), ("no FFN", 0)):
            keep = {s.name: list(range(s.units)) for s in self.model.anatomy}
            keep |= {s.name: self.units(s) if count is None else [] for s in sites}
            modules[name] = copy.deepcopy(self.model.module)
            slice_model(modules[name], self.model.anatomy, keep)
        modules["d x d"] = copy.deepcopy(self.model.module)
        for site in sites:
            _linear_ffn(modules["d x d"], site, self.sublayers.linear(site))
        times: dict[str, list[float]] = {name: [] for name in modules}
        with torch.inference_mode():
            for turn in range(_TURNS + 5):
                for name, module in modules.items():
                    began = time.perf_counter()
                    self.model.output(batch.inputs, module)
                    if turn >= 5:
                        times[name].append(1000 * (time.perf_counter() - began))
        return {name: statistics.median(found) for name, found in times.items()}


def _linear_ffn(module: nn.Module, site: Site, found: Map) -> None:
    """Put the map where the FFN's first layer is, and nothing where its activation and its second layer are."""
    layer = nn.Linear(*found[0].T.shape)
    layer.weight.data, layer.bias.data = (part.float().contiguous() for part in found)
    first = site.producers[0].path
    for path, new in ((first, layer), (site.consumer, nn.Identity())):
        parent, _, name = path.rpartition(".")
        setattr(module.get_submodule(parent), name, new)
    owner = module.get_submodule(first.rpartition(".")[0])
    for name in ("intermediate_act_fn", "act"):
        if hasattr(owner, name):
            setattr(owner, name, nn.Identity())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--work", type=Path, help="keep rankings here (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for case in (case for case in CASES if case.name in options.models.split(",")):
            compared = Comparison(case, options.shared.resolve(), work, options.rows)
            print(f"\n{case.title}: distance x 1000 with one sublayer replaced\n")
            print(
                "| block | sublayer | by its mean | map of rank d / 4 | map d x d | units, refitted | units |"
            )
            print("|---" * 7 + "|")
            for row in compared.rows():
                print(row, flush=True)
            for size in (1, 32):
                found = compared.milliseconds(size)
                print(f"\nbatch {size}, ms: " + ", ".join(f"{name} {ms:.2f}" for name, ms in found.items()))


if __name__ == "__main__":
    main()
