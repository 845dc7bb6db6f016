"""Accuracy against MACs kept: every method on the same model, data, budgets and calibration seeds.

    python benchmarks/accuracy.py [--shared ../shared] [--cells benchmarks/accuracy] [--only ours,optin]
                                  [--models minilm-stsb,minilm-sst2] [--budgets 0.5,0.4] [--seeds 0,1,2]
                                  [--mpnet FOLDER]
    python benchmarks/accuracy.py --report      # tables and plots from the cells that are there

Cells go into a JSON file for each model one by one, so a run that is stopped goes on where it was, and models may be
measured side by side. Nothing is compared across machines: a cell knows where it was measured.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from cells import SEEDS, Case, Cells, Method, parser_of, report
from torch import Tensor

from optin_cli.artefacts.mask import Mask
from optin_cli.artefacts.ranking import Ranking, read_sketch
from optin_cli.artefacts.sketch import Sketch
from optin_cli.compensation.plan import make_plan as plan_compensation
from optin_cli.compensation.settings import Compensation
from optin_cli.data.batches import Batch, Batches
from optin_cli.data.examples import sample
from optin_cli.data.sources import DataSpec
from optin_cli.loading.checkpoint import OpenModel, open_model
from optin_cli.measure.evaluate import evaluate
from optin_cli.pipeline import prune_in_steps
from optin_cli.pruning.apply import apply
from optin_cli.scoring.plan import ScoreSettings, make_plan
from optin_cli.scoring.score import existing, score
from optin_cli.selection.select import select
from optin_cli.selection.settings import Request

_CIFAR = "data/cifar10", "test", "top1"
_IMAGE_BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
CASES = (
    Case(
        "minilm-stsb", "demo:minilm", "data/stsb", "test", "spearman", "all-MiniLM-L6-v2, stsb test, Spearman"
    ),
    Case(
        "minilm-sst2",
        "models/minilm-l6-sst2",
        "data/sst2",
        "validation",
        "accuracy",
        "minilm-l6-sst2, sst2 validation, accuracy",
    ),
    Case(
        "mpnet-stsb",
        "models/all-mpnet-base-v2",
        "data/stsb",
        "test",
        "spearman",
        "all-mpnet-base-v2, stsb test, Spearman",
    ),
    Case(
        "vit-cifar10",
        "models/vit-cifar10",
        *_CIFAR,
        "ViT of the zoo, CIFAR-10 test, top-1",
        _IMAGE_BUDGETS,
        True,
    ),
    Case(
        "resnet-cifar10",
        "models/resnet-cifar10",
        *_CIFAR,
        "ResNet of the zoo, CIFAR-10 test, top-1",
        _IMAGE_BUDGETS,
        heads=False,
    ),
    Case(
        "vgg-cifar10",
        "models/vgg-cifar10",
        *_CIFAR,
        "VGG of the zoo, CIFAR-10 test, top-1",
        _IMAGE_BUDGETS,
        heads=False,
    ),
)
# rankings of any age may be reused: what their own weights are does not count
_AUTO = {"feature_weights": "auto"}
_MILD = {"feature_weights": "fourth-root", "output_weight": 0.3}
_ROOT = {"feature_weights": "root", "output_weight": 0.1}


def _merging(name: str, title: str, merge: str) -> Method:
    return Method(name, title, {"tokens": True}, {"merge": merge, **_ROOT}, "auto", True, tokens=True)


def _stepwise(name: str, title: str, producers: bool) -> Method:
    return Method(name, title, {"output_weight": _ROOT["output_weight"]}, _ROOT, "auto", producers, steps=4)


METHODS = (
    Method("random", "random", {"method": "random"}),
    Method("magnitude", "magnitude", {"method": "magnitude"}),
    Method("reference", "OPTIN as released", {"method": "reference"}),
    # its best lambda without compensation
    Method(
        "optin", "OPTIN, the paper", {"method": "mixed"}, {"output_weight": 1.0, "feature_weights": "sum"}
    ),
    Method("ptf-search", "PTF search", {"method": "fisher", "per_batch": True}),
    Method(
        "ptf-full",
        "PTF's parts: Fisher, layer swaps, scale",
        {"method": "fisher"},
        {"interactions": "layer"},
        "scale",
    ),
    # lambda 0 is the best of the three that K-prune's own search tries
    Method(
        "k-prune",
        "K-prune's knowledge and refit of consumers",
        {"method": "knowledge", "output_weight": 0.0},
        {},
        "full",
    ),
    Method("ours", "ours", {"ranks": None}, _AUTO, "auto", producers=True),
    Method("ours-whole", "ours, whole heads (--no-ranks)", {}, _AUTO, "auto", producers=True),
    Method("ours-root", "root and lambda 0.1 at every budget", {}, _ROOT, "auto", producers=True),
    Method("ours-mild", "fourth root and 0.3 at every budget", {}, _MILD, "auto", producers=True),
    Method("ours-consumers", "root and 0.1, --no-producers", {}, _ROOT, "auto"),
    Method(
        "ours-sum",
        "sum and 0.3, --no-producers",
        {"method": "mixed"},
        {"output_weight": 0.3, "feature_weights": "sum"},
        "auto",
    ),
    Method("ours-mixed", "root and 0.1, --no-producers, --method mixed", {"method": "mixed"}, _ROOT, "auto"),
    _merging("tokens", "root and 0.1, tokens alone", "only"),
    _merging("joint", "root and 0.1, units and tokens", "joint"),
    _stepwise("ours-4-consumers", "root and 0.1, --no-producers, --steps 4", producers=False),
    _stepwise("ours-4", "root and 0.1, --steps 4", producers=True),
)


class Kept(Batches):
    """Batches that are made once, for the many models that will see them."""

    @cached_property
    def made(self) -> list[Batch]:
        return list(super().__iter__())

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.made)


class Remembering(OpenModel):
    """The dense model: what it said of one of the `Kept` batches it says again without computing."""

    @cached_property
    def said(self) -> dict[int, Tensor]:
        return {}

    def full_output(self, inputs: Mapping[str, Tensor]) -> Tensor:
        key = id(next(iter(inputs.values())))  # the batches live as long as this model
        if key not in self.said:
            self.said[key] = super().full_output(inputs)
        return self.said[key]


def distance(fidelity: Mapping[str, float]) -> float:
    """From the dense outputs: KL, or 1 - cosine."""
    return fidelity["kl"] if "kl" in fidelity else 1 - fidelity["cosine"] / 100


def remembering(model: OpenModel) -> Remembering:
    """The same model as one that remembers."""
    return Remembering(*(getattr(model, field.name) for field in fields(model)))


class Runner:
    """Runs the cells of one case; dense outputs and rankings are made once."""

    def __init__(self, case: Case, shared: Path, work: Path) -> None:
        self.case, self.work = case, work
        spec = case.model(shared)
        assert spec is not None
        self.spec = spec
        self.data = str(shared / case.data)
        self.dense = remembering(open_model(self.spec))
        rows = sample(
            DataSpec(self.data, case.test), self.dense.family.modality, None, 0, reader=self.dense.task.reader
        )
        self.batches = Kept(rows, self.dense.processor, 64, reader=self.dense.task.reader)

    def select(self, ranking: Ranking, request: Request, sketch: Sketch | None) -> Mask:
        """The mask of a cell."""
        return select(ranking, request, sketch)

    def run(self, method: Method, budget: float, seed: int) -> dict[str, Any]:
        """Prune and measure one cell."""
        settings = ScoreSettings(seed=seed, **{"ranks": False, **method.scoring})
        plan = make_plan(open_model(self.spec), DataSpec(self.data), settings)
        path = self.work / f"{self.case.name}-{plan.settings.method}-{seed}.h5"
        for option in ("per_batch", "tokens", "ranks"):
            if getattr(plan.settings, option):
                path = path.with_stem(f"{path.stem}-{option.replace('_', '-')}")
        output = self.work / f"{self.case.name}-{method.name}-{budget}-{seed}"
        seconds = {}
        ranking = existing(path, plan, any_lambda=True)
        if ranking is None:
            ranking = score(plan, path)
        seconds["score"] = ranking.seconds
        request = Request(flops=budget, **method.request)
        compensation = Compensation(method=method.compensation, producers=method.producers, seed=seed)
        started = time.perf_counter()
        if method.steps > 1:
            prune_in_steps(
                plan,
                request,
                output,
                path,
                method.steps,
                compensation=compensation,
                rankings=self.work,
                force=True,
            )
        else:
            mask = self.select(
                ranking, request, read_sketch(path) if "interactions" in method.request else None
            )
            again = plan_compensation(plan.model, mask, compensation, plan.examples.data, at_most=True)
            apply(plan.model, mask, output, plan=again)
        seconds["prune"] = time.perf_counter() - started
        found = evaluate(open_model(str(output)), self.batches, self.dense)
        return {
            "metrics": found.metrics | found.fidelity,
            "dense": found.baseline_metrics,
            "seconds": {name: round(value, 1) for name, value in seconds.items()},
            "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
            "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        }


def wanted(options: argparse.Namespace, shared: Path) -> Iterator[tuple[Case, Method, float, int]]:
    """Seed by seed, so that a stopped run has whole tables of the first ones."""

    def chosen(given: str, items: Any) -> list[Any]:
        names = given.split(",") if given else [item.name for item in items]
        unknown = set(names) - {item.name for item in items}
        if unknown:
            sys.exit(f"no {', '.join(sorted(unknown))}; there is {', '.join(item.name for item in items)}")
        return [item for item in items if item.name in names]

    cases = []
    for case in chosen(options.models, CASES):
        if case.name.startswith("mpnet") and options.mpnet:
            case = replace(case, spec=str(options.mpnet.resolve()))
        if case.model(shared):
            cases.append(case)
        else:
            print(f"left out: {case.title} (no model there)", file=sys.stderr)
    budgets = [float(b) for b in options.budgets.split(",")] if options.budgets else None
    seeds = [int(s) for s in options.seeds.split(",")] if options.seeds else SEEDS
    methods = chosen(options.only, METHODS)
    return (
        (case, method, budget, seed)
        for seed in seeds
        for case in cases
        for method in methods
        if (case.tokens or not method.tokens) and (case.heads or method.name != "ours-whole")
        for budget in budgets or case.budgets
    )


def measure(options: argparse.Namespace) -> None:
    shared = options.shared.resolve()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        runners: dict[str, Runner] = {}
        for case, method, budget, seed in wanted(options, shared):
            cells, key = Cells(options.cells, case.name), f"{method.name}/{budget}/{seed}"
            if key in cells.found:
                continue
            if case.name not in runners:
                runners[case.name] = Runner(case, shared, work)
            cell = runners[case.name].run(method, budget, seed)
            cells.put(key, cell)
            value = cell["metrics"][case.metric]
            print(f"{case.name}/{key}: {value:.2f}  {cell['seconds']}", file=sys.stderr, flush=True)


def main() -> None:
    parser = parser_of(__doc__, "accuracy")
    parser.add_argument(
        "--work", type=Path, help="keep rankings and models here (default: a temporary folder)"
    )
    parser.add_argument("--only", default="", help=f"methods: {','.join(m.name for m in METHODS)}")
    parser.add_argument("--models", default="", help=f"models: {','.join(c.name for c in CASES)}")
    parser.add_argument(
        "--mpnet", type=Path, help="folder of all-mpnet-base-v2, where the shared one lacks it"
    )
    parser.add_argument("--budgets", default="")
    parser.add_argument("--seeds", default="")
    options = parser.parse_args()
    if not options.report:
        measure(options)
    report(options.cells, CASES, METHODS)


if __name__ == "__main__":
    main()
