"""What `select --uniform` costs, and what it takes to load a pruned directory with and without optin.

    python benchmarks/uniform.py [--shared ../shared] [--cells benchmarks/uniform] [--models minilm-stsb,..]
                                 [--budgets 0.4,0.3] [--only uniform,as-if-ranks] [--work FOLDER]
    python benchmarks/uniform.py --load          # seconds and memory of opening MiniLM, dense and pruned
    python benchmarks/uniform.py --report        # tables from the cells that are there

Cells are those of accuracy.py: the same data, calibration and seed, kept one by one, so that a run that is stopped goes
on where it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import processes
from accuracy import CASES, Runner
from cells import Cells, Method, parser_of

from optin_cli.artefacts.mask import Mask
from optin_cli.artefacts.ranking import Ranking
from optin_cli.artefacts.sketch import Sketch
from optin_cli.selection.select import select
from optin_cli.selection.settings import Request

BUDGETS = (0.7, 0.6, 0.5, 0.4, 0.3)
MODELS = ("minilm-stsb", "minilm-sst2", "vit-cifar10")
METHODS = (
    Method("free", "free", {}, {"feature_weights": "auto"}, "auto", producers=True),
    Method("uniform", "uniform", {}, {"feature_weights": "auto", "uniform": True}, "auto", producers=True),
    Method(
        "as-if-heads",
        "uniform, were heads sizable",
        {},
        {"feature_weights": "auto", "uniform": True},
        "auto",
        producers=True,
    ),
    Method(
        "as-if-ranks",
        "uniform, were heads and their width sizable",
        {"ranks": None},
        {"feature_weights": "auto", "uniform": True},
        "auto",
        producers=True,
    ),
)
SEED = 0


class AsIf(Runner):
    """Selects as if the model's class took the number of heads and their width from its config, as others do."""

    def select(self, ranking: Ranking, request: Request, sketch: Sketch | None) -> Mask:
        entries = {"heads": {"entry": "num_heads", "width": "head_dim"}, "neurons": {"entry": "hidden"}}
        config = {site.name: {"each": 1, **entries[site.kind]} for site in ranking.sites}
        ranking = replace(ranking, model={**ranking.model, "config": config})  # type: ignore[typeddict-item]
        mask = select(ranking, request, sketch)
        del mask.budget["uniform"]  # so that it is written like any other
        return mask


def measure(options: argparse.Namespace) -> None:
    """Every budget with layers of any size and with layers of one, side by side."""
    shared = options.shared.resolve()
    chosen = [method for method in METHODS if not options.only or method.name in options.only.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        for case in (case for case in CASES if case.name in options.models.split(",")):
            runners: dict[type[Runner], Runner] = {}
            for budget in map(float, options.budgets.split(",")):
                for method in chosen:
                    cells, key = Cells(options.cells, case.name), f"{method.name}/{budget}/{SEED}"
                    if key in cells.found:
                        continue
                    kind = AsIf if method.name.startswith("as-if") else Runner
                    if kind not in runners:
                        runners[kind] = kind(case, shared, options.work or Path(temporary))
                    cells.put(key, runners[kind].run(method, budget, SEED))
                    print(
                        f"{case.name}/{key}: {cells.found[key]['metrics'][case.metric]:.2f}", file=sys.stderr
                    )


def report(folder: Path) -> None:
    """A table of all models."""
    print(f"| | {' | '.join(f'{budget:g}' for budget in BUDGETS)} |")
    print("|---" * (len(BUDGETS) + 1) + "|")
    for case in (case for case in CASES if case.name in MODELS):
        cells = Cells(folder, case.name)
        if not cells.found:
            continue
        dense = next(iter(cells.found.values()))["dense"][case.metric]
        for method in METHODS:
            values = [cells.found.get(f"{method.name}/{budget}/{SEED}") for budget in BUDGETS]
            if not any(values):
                continue
            texts = [f"{cell['metrics'][case.metric]:.2f}" if cell else "" for cell in values]
            print(f"| {case.title} (dense {dense:.2f}), {method.title} | {' | '.join(texts)} |")


OPEN = """
import json, resource, sys, time
how, folder = sys.argv[1:]
import torch, transformers
transformers.BertModel, transformers.AutoModel
if how == "optin":
    import optin_cli
    optin_cli.load
    from optin_cli.loading.checkpoint import open_model
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
if how == "optin":
    model = optin_cli.load(folder)
else:
    model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=how == "remote code")
seconds = time.perf_counter() - started
more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps([seconds, more / 1024]))
"""


def loading(repeats: int) -> None:
    """MiniLM at 0.5: each way in processes of its own, in turn. Imports are not counted."""
    import optin_cli as optin
    from optin_cli.loading.sources import resolve

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = optin.open_model("demo:minilm")
        ranking = optin.score(model, "builtin:docs", samples=64)
        for name, uniform in (("free", False), ("uniform", True)):
            mask = optin.select(ranking, flops=0.5, uniform=uniform)
            optin.apply(model, mask, output=folder / name, compensate="none")
        dense = resolve("demo:minilm").folder
        ways = {
            "dense, transformers": ("transformers", dense),
            "0.5, transformers with trust_remote_code": ("remote code", folder / "free"),
            "0.5, optin.load": ("optin", folder / "free"),
            "0.5 uniform, transformers": ("transformers", folder / "uniform"),
            "0.5 uniform, optin.load": ("optin", folder / "uniform"),
        }
        found: dict[str, list[list[float]]] = {name: [] for name in ways}
        for _ in range(repeats):
            for name, (how, where) in ways.items():
                done = processes.run([sys.executable, "-c", OPEN, how, where])
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
    print("| | seconds | MiB above the imports |\n|---|---|---|")
    for name, runs in found.items():
        seconds, memory = (statistics.median(values) for values in zip(*runs, strict=True))
        print(f"| {name} | {seconds:.2f} | {memory:.0f} |")


def main() -> None:
    parser = parser_of(__doc__, "uniform")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--only", default="", help=f"methods: {','.join(m.name for m in METHODS)}")
    parser.add_argument("--work", type=Path, help="keep rankings here (default: a temporary folder)")
    parser.add_argument("--load", action="store_true")
    parser.add_argument("--repeats", type=int, default=7, help="of --load")
    options = parser.parse_args()
    if options.load:
        loading(options.repeats)
        return
    if not options.report:
        measure(options)
    report(options.cells)


if __name__ == "__main__":
    main()
