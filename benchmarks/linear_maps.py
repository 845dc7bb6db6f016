"""Would a sublayer be better replaced by a linear map than by a few of its own units?

    python benchmarks/linear_maps.py [--shared ../shared] [--models minilm-stsb,minilm-sst2,vit-cifar10] [--rows 2048]

Each attention and FFN in turn, all else dense, is replaced by its mean output, by a linear map of what it reads (d x d,
and of a quarter of that rank at half of the MACs), and by its best units for as many MACs as the map, with their
consumer refitted. Maps and consumers are fitted on training rows; the divergence from the dense outputs (KL, or 1 -
cosine) is measured on other ones. Then the time of one example and of 32, with all FFNs replaced alike.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy import CASES, Kept
from cells import Case
from torch import Tensor, nn
from torch.nn import functional as F

from optin_cli.artefacts.ranking import Ranking
from optin_cli.data.batches import Batches
from optin_cli.data.examples import sample
from optin_cli.data.sources import DataSpec
from optin_cli.loading.checkpoint import OpenModel, open_model
from optin_cli.scoring.plan import ScoreSettings, make_plan
from optin_cli.scoring.score import existing, score
from optin_cli.selection.problem import pose
from optin_cli.selection.settings import Request
from optin_cli.structure.anatomy import Site
from optin_cli.structure.layers import like_weight, matrix
from optin_cli.transforms.slicing import slice_model

MODELS = ("minilm-stsb", "minilm-sst2", "vit-cifar10")
_RIDGE = 1e-3
_UNIT_RIDGE = 1e-2
_TURNS = 60

Map = tuple[Tensor, Tensor]
"""(weight, bias)"""


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
            ridge = _UNIT_RIDGE * within.diagonal().mean()
            wanted = centred[kept] @ weight.T + ridge * weight[:, kept].T
            within.diagonal().add_(ridge)
            new[:, kept] = torch.cholesky_solve(wanted, torch.linalg.cholesky(within)).T
        bias = layer.bias.detach().double() + (weight - new) @ mean
        return like_weight(layer, new).to(layer.weight.dtype), bias.to(layer.weight.dtype)


def divergence(ours: Tensor, dense: Tensor, model: OpenModel) -> Tensor:
    """Of each example."""
    if model.task.name == "embedding":
        return 1 - torch.cosine_similarity(ours, dense, dim=-1)
    logs, wanted = ours.log_softmax(-1), dense.log_softmax(-1)
    return (wanted.exp() * (wanted - logs)).sum(-1)


class Runner:
    """One case: the dense model, its rows, its rankings."""

    def __init__(self, case: Case, shared: Path, work: Path) -> None:
        spec = case.model(shared)
        assert spec is not None
        self.case, self.work, self.spec, self.data = case, work, spec, DataSpec(str(shared / case.data))
        self.dense = open_model(spec)

    def rows(self, split: str, count: int | None, seed: int) -> Kept:
        reader = self.dense.task.reader
        rows = sample(replace(self.data, split=split), self.dense.family.modality, count, seed, reader=reader)
        return Kept(rows, self.dense.processor, 64, reader=reader)

    def ranking(self, seed: int) -> Ranking:
        path = self.work / f"{self.case.name}-{seed}.h5"
        plan = make_plan(open_model(self.spec), self.data, ScoreSettings(seed=seed, ranks=False))
        return existing(path, plan, any_lambda=True) or score(plan, path)


class Sublayers:
    """What each attention and FFN reads and gives in the dense model."""

    def __init__(self, model: OpenModel) -> None:
        self.model = model
        self.sites = list(model.anatomy)
        self.read = {site.name: model.module.get_submodule(site.producers[0].path) for site in self.sites}
        self.gives = {site.name: model.module.get_submodule(site.consumer) for site in self.sites}

    def linear(self, rows: Kept) -> dict[str, Map]:
        """The best linear map of each, by ridge regression; columns are inputs."""
        seen: dict[str, Tensor] = {}
        sums: dict[str, tuple[Tensor, Tensor]] = {}
        valid: Tensor | None = None

        def keep(name: str, value: Tensor) -> Tensor:
            whole = valid is None or valid.shape != value.shape[:2]
            return (value.flatten(0, -2) if whole else value[valid]).double()

        def reads(name: str) -> Any:
            def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                seen[name] = keep(name, args[0])

            return note

        def gives(name: str) -> Any:
            def add(_: nn.Module, __: Any, output: Tensor) -> None:
                x = torch.cat([seen[name], seen[name].new_ones(len(seen[name]), 1)], 1)
                found = x.T @ x, x.T @ keep(name, output)
                before = sums.get(name)
                sums[name] = (found[0] + before[0], found[1] + before[1]) if before else found

            return add

        with ExitStack() as stack, torch.inference_mode():
            for site in self.sites:
                stack.callback(self.read[site.name].register_forward_pre_hook(reads(site.name)).remove)
                stack.callback(self.gives[site.name].register_forward_hook(gives(site.name)).remove)
            for batch in rows:
                valid = batch.valid
                self.model.output(batch.inputs)
        return {name: _solved(*both) for name, both in sums.items()}

    @contextmanager
    def replaced(self, maps: Mapping[str, Map]) -> Iterator[None]:
        """Within the context, consumers give these maps of what their sublayer reads."""
        seen: dict[str, Tensor] = {}

        def reads(name: str) -> Any:
            return lambda _, args: seen.__setitem__(name, args[0])

        def gives(name: str, weight: Tensor, bias: Tensor) -> Any:
            return lambda _, __, output: F.linear(seen[name], weight, bias).reshape(output.shape)

        with ExitStack() as stack:
            for name, (weight, bias) in maps.items():
                stack.callback(self.read[name].register_forward_pre_hook(reads(name)).remove)
                hook = gives(name, weight.float(), bias.float())
                stack.callback(self.gives[name].register_forward_hook(hook).remove)
            yield


def _solved(gram: Tensor, cross: Tensor) -> Map:
    count, mean = gram[-1, -1], gram[-1, :-1] / gram[-1, -1]
    centred = gram[:-1, :-1] - count * torch.outer(mean, mean)
    wanted = cross[:-1] - torch.outer(mean, cross[-1])
    centred.diagonal().add_(_RIDGE * centred.diagonal().mean())
    weight = torch.cholesky_solve(wanted, torch.linalg.cholesky(centred)).T
    return weight, cross[-1] / count - weight @ mean


def of_rank(found: Map, rank: int, mean: Tensor) -> Map:
    """The map with the largest singular values alone; what it gives for the mean input stays."""
    weight, bias = found
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    low = (u[:, :rank] * s[:rank]) @ v[:rank]
    return low, bias + (weight - low) @ mean


class Comparison:
    """One model."""

    def __init__(self, runner: Runner, ranking: Ranking, count: int) -> None:
        self.model, self.ranking = runner.dense, ranking
        fitted, self.held = runner.rows("train", count, 0), runner.rows("train", 256, 1000)
        self.sublayers = Sublayers(self.model)
        self.maps = self.sublayers.linear(fitted)
        self.library = Library(self.model, fitted)
        with torch.inference_mode():
            self.dense = [self.model.output(batch.inputs) for batch in self.held]
        self.problem = pose(ranking, Request(flops=0.3))
        self.order = {
            site.name: np.argsort(-scores, kind="stable")
            for site, scores in zip(self.problem.sites, self.problem.scores, strict=True)
        }

    def units(self, site: Site) -> list[int]:
        """The best units for at least as many MACs as a map d x d."""
        ranked = next(s for s in self.problem.sites if s.name == site.name)
        wanted = len(self.maps[site.name][1]) ** 2
        count = next(
            n
            for n in range(1, site.units + 1)
            if ranked.macs(self.ranking.tokens, n) >= wanted * self.ranking.tokens
        )
        return sorted(self.order[site.name][:count].tolist())

    def loss(self, maps: Mapping[str, Map]) -> float:
        parts = []
        with torch.inference_mode(), self.sublayers.replaced(maps):
            for batch, dense in zip(self.held, self.dense, strict=True):
                parts.append(divergence(self.model.output(batch.inputs), dense, self.model))
        return float(torch.cat(parts).mean())

    def with_units(self, site: Site, units: list[int]) -> float:
        layer: Any = self.model.module.get_submodule(site.consumer)
        before = layer.weight.data, layer.bias.data
        layer.weight.data, layer.bias.data = self.library.consumer(site.name, units)
        try:
            return self.loss({})
        finally:
            layer.weight.data, layer.bias.data = before

    def rows(self) -> Iterator[str]:
        for site in self.sublayers.sites:
            gram, (weight, bias) = self.library.grams[site.name], self.maps[site.name]
            layer: Any = self.sublayers.gives[site.name]
            given = layer.weight.double() @ (gram[-1, :-1] / gram[-1, -1]) + layer.bias.double()
            nothing = torch.zeros_like(weight), given.detach()
            mean = torch.linalg.lstsq(weight, given.detach() - bias).solution
            low = of_rank((weight, bias), len(weight) // 4, mean)
            units = self.units(site)
            losses = [
                self.loss({site.name: nothing}), self.loss({site.name: low}), self.loss({site.name: (weight, bias)}),
                self.with_units(site, units),
            ]  # fmt: skip
            told = " | ".join(f"{1000 * loss:.2f}" for loss in losses)
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
        slice_model(
            modules["d x d"], self.model.anatomy, {s.name: list(range(s.units)) for s in self.model.anatomy}
        )
        for site in sites:  # the first layer of the FFN is the map, what follows gives what it is given
            weight, bias = self.maps[site.name]
            _linear_ffn(modules["d x d"], site, weight.float(), bias.float())
        times: dict[str, list[float]] = {name: [] for name in modules}
        with torch.inference_mode():
            for turn in range(_TURNS + 5):
                for name, module in modules.items():
                    began = time.perf_counter()
                    self.model.output(batch.inputs, module)
                    if turn >= 5:
                        times[name].append(1000 * (time.perf_counter() - began))
        return {name: statistics.median(found) for name, found in times.items()}


def _linear_ffn(module: nn.Module, site: Site, weight: Tensor, bias: Tensor) -> None:
    """Put the map where the FFN's first layer is, and nothing where its activation and its second layer are."""
    first, second = site.producers[0].path, site.consumer
    layer = nn.Linear(*weight.T.shape)
    layer.weight.data, layer.bias.data = weight.contiguous(), bias
    for path, new in ((first, layer), (second, nn.Identity())):
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
            runner = Runner(case, options.shared.resolve(), work)
            compared = Comparison(runner, runner.ranking(0), options.rows)
            print(f"\n{case.title}: divergence x 1000 with one sublayer replaced\n")
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
