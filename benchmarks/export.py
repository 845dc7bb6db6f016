"""Pruned and quantised: what exported files keep, weigh and take, dense and at half of the MACs.

    python benchmarks/export.py WORK [--shared ../shared] [--cells benchmarks/export] [--models minilm-stsb,vit-cifar10]
                                     [--mpnet FOLDER] [--threads 1] [--rows N] [--seconds 5] [--lengths 16,64,128]
                                     [--only quality,latency]
    python benchmarks/export.py WORK --report     # tables from the cells that are there

WORK keeps pruned models and exported files. Cells go into a JSON file for each model one by one, so a run that is
stopped goes on where it was: one for the quality of each file, one for the latency of all of them at a batch size and
length, timed interleaved. --mpnet is a directory of all-mpnet-base-v2. OpenVINO is measured where it is installed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cells import Case, Cells, parser_of

import optin_cli as optin
from optin_cli.artefacts.latency import processor_name
from optin_cli.data.sources import DataSpec
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.measure import latency
from optin_cli.measure.memory import disk_bytes
from optin_cli.runtimes.opening import open_exported

BUDGET = 0.5
SAMPLES = 512
BATCHES, LENGTHS = (1, 8, 32), "16,64,128"
CASES = (
    Case("minilm-stsb", "demo:minilm", "data/stsb", "test", "spearman", "all-MiniLM-L6-v2, stsb test, Spearman"),
    Case(
        "minilm-sst2", "models/minilm-l6-sst2", "data/sst2", "validation", "accuracy",
        "minilm-l6-sst2, sst2 validation, accuracy",
    ),
    Case("mpnet-stsb", "mpnet", "data/stsb", "test", "spearman", "all-mpnet-base-v2, stsb test, Spearman"),
    Case("vit-cifar10", "models/vit-cifar10", "data/cifar10", "test", "top1", "ViT of the zoo, CIFAR-10 test, top-1"),
)  # fmt: skip
TORCH = "torch float32"
VARIANTS: dict[str, dict[str, Any]] = {
    "onnxruntime float32": {"to": "onnx"},
    "onnxruntime int8": {"to": "onnx", "int8": True},
    "onnxruntime int8, no layer in float": {"to": "onnx", "int8": True, "max_error": 100.0},
    "openvino float32": {"to": "openvino"},
    "openvino int8": {"to": "openvino", "int8": True},
}
"""Name of a file -> the options of its export."""
SIDES = ("dense", "pruned")


def variants() -> dict[str, dict[str, Any]]:
    """Those that are possible here."""
    there = {name for name in ("openvino", "nncf") if importlib.util.find_spec(name) is not None}
    needed = {name: _packages(options) for name, options in VARIANTS.items()}
    return {name: options for name, options in VARIANTS.items() if needed[name] <= there}


def _packages(options: dict[str, Any]) -> set[str]:
    """Packages that optin's tests do without."""
    if options["to"] != "openvino":
        return set()
    return {"openvino", "nncf"} if options.get("int8") else {"openvino"}


class Run:
    """One model: its pruned copy, its files, its cells."""

    def __init__(self, case: Case, given: argparse.Namespace) -> None:
        self.case, self.given = case, given
        self.spec = given.mpnet if case.name == "mpnet-stsb" else case.model(given.shared)
        self.folder = given.work / case.name
        self.cells = Cells(given.cells, case.name)
        self.train = DataSpec(str(given.shared / case.data), split="train")
        self.test = DataSpec(str(given.shared / case.data), split=case.test)

    def model(self, side: str) -> str:
        return str(self.spec) if side == "dense" else str(self.folder / f"{BUDGET}")

    def file(self, side: str, variant: str) -> Path:
        slug = variant.replace(",", "").replace(" ", "-")
        return self.folder / side / slug

    def make(self) -> None:
        """Prune and export what is not there yet."""
        self.folder.mkdir(parents=True, exist_ok=True)
        dense = optin.open_model(self.model("dense"), device="cpu")
        if not Path(self.model("pruned")).exists():
            optin.prune(dense, self.train, flops=BUDGET, samples=SAMPLES, output=self.model("pruned"))
        for side in SIDES:
            model = optin.open_model(self.model(side), device="cpu")
            for variant, options in variants().items():
                made = optin.export(model, self.file(side, variant), self.train, **options)
                said = "there" if made.reused else f"deviates by {made.facts['deviation']:.1e}"
                print(f"{self.case.name} {side} {variant}: {said}", flush=True)

    def opened(self, side: str, variant: str) -> OpenModel:
        if variant == TORCH:
            return optin.open_model(self.model(side), device="cpu")
        return open_exported(str(self.file(side, variant)))

    def quality(self) -> None:
        for side in SIDES:
            for variant in (TORCH, *variants()):
                if (key := f"quality/{side}/{variant}") in self.cells.found:
                    continue
                model = self.opened(side, variant)
                found = optin.evaluate(model, self.test, samples=self.given.rows)
                facts = self._facts(side, variant)
                cell = {"metrics": found.metrics, "rows": found.examples, "bytes": disk_bytes(model), **facts}
                self.cells.put(key, cell | where())
                print(key, f"{found.metrics[self.case.metric]:.2f}", flush=True)

    def _facts(self, side: str, variant: str) -> dict[str, Any]:
        """What the record of a file says."""
        if variant == TORCH:
            return {}
        record = json.loads((self.file(side, variant) / "optin-export.json").read_text())
        (facts,) = record["files"].values()
        kept = ("deviation", "agreement", "float_layers", "layer_errors", "opset", "versions")
        return {name: facts[name] for name in kept if name in facts}

    def speed(self) -> None:
        models = None
        for batch, size in self._settings():
            if (key := f"latency/{batch}/{size}") in self.cells.found:
                continue
            names = [(side, variant) for side in SIDES for variant in (TORCH, *variants())]
            models = models or [replace_spec(self.opened(*name), " ".join(name)) for name in names]
            sizes = None if size == "own" else [int(size)]
            timings = latency.bench(models, [batch], sizes, seconds=self.given.seconds * len(models))
            medians = {one.model: one.median_ms for one in timings}
            spread = {one.model: [one.p10_ms, one.p90_ms] for one in timings}
            rounds, threads = timings[0].rounds, timings[0].threads
            cell = {"ms": medians, "p10_p90": spread, "rounds": rounds, "threads": threads}
            self.cells.put(key, cell | where())
            print(key, {name: round(value, 2) for name, value in medians.items()}, flush=True)

    def _settings(self) -> Iterator[tuple[int, str]]:
        images = self.case.name.startswith("vit")
        for size in ("own",) if images else self.given.lengths.split(","):
            for batch in BATCHES:
                yield batch, size


def replace_spec(model: OpenModel, name: str) -> OpenModel:
    return replace(model, source=replace(model.source, spec=name))


def where() -> dict[str, str]:
    return {"machine": processor_name(), "date": f"{datetime.date.today()}"}


def report(run: Run) -> None:
    """Quality and size of each file; then milliseconds, and the two ratios that the aims are about."""
    found, metric = run.cells.found, run.case.metric
    if not found:
        return
    some = next(iter(found.values()))
    print(f"### {run.case.title}\n\n{some['date']}, {some['machine']}\n")
    print(
        f"| model | run by | {metric} | lost to its float32 | on disk | layers in float |\n|---|---|---|---|---|---|"
    )
    for side in SIDES:
        base = found.get(f"quality/{side}/{TORCH}")
        for variant in (TORCH, *VARIANTS):
            if base and (cell := found.get(f"quality/{side}/{variant}")):
                value, lost = cell["metrics"][metric], base["metrics"][metric] - cell["metrics"][metric]
                left = len(cell["float_layers"]) if "float_layers" in cell else ""
                disk = f"{cell['bytes'] / 2**20:.1f} MiB" if cell["bytes"] else ""
                print(f"| {side} | {variant} | {value:.2f} | {lost:+.2f} | {disk} | {left} |")
    settings = sorted((key for key in found if key.startswith("latency/")), key=_in_order)
    cells = {key: found[key] for key in settings}
    if not cells:
        print()
        return
    names = list(dict.fromkeys(name for cell in cells.values() for name in cell["ms"]))
    print("\n| ms | " + " | ".join(key.removeprefix("latency/") for key in cells) + " |")
    print("|---" * (len(cells) + 1) + "|")
    for name in names:
        print(f"| {name} | " + " | ".join(f"{cell['ms'].get(name, 0):.2f}" for cell in cells.values()) + " |")
    for ours in [name for name in names if name.startswith("pruned") and "int8" in name]:
        for other in (ours.replace("pruned", "dense"), f"dense {TORCH}", "dense onnxruntime float32"):
            ratios = [f"{c['ms'][other] / c['ms'][ours]:.2f}x" for c in cells.values() if other in c["ms"]]
            print(f"| {ours} over {other} | " + " | ".join(ratios) + " |")
    print()


def _in_order(key: str) -> list[tuple[int, str]]:
    """By length, then by batch size."""
    _, batch, size = key.split("/")
    return [(len(size), size), (len(batch), batch)]


def main() -> None:
    parser = parser_of(__doc__, "export")
    parser.add_argument("work", type=Path)
    parser.add_argument("--models", default="minilm-stsb,minilm-sst2,vit-cifar10")
    parser.add_argument("--mpnet", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, help="test rows, by default all")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each model and setting")
    parser.add_argument("--lengths", default=LENGTHS, help="tokens of the texts that are timed")
    parser.add_argument("--only", default="quality,latency")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    chosen = given.models.split(",") + (["mpnet-stsb"] if given.mpnet else [])
    for case in CASES:
        if case.name not in chosen:
            continue
        run = Run(case, given)
        if not given.report:
            if run.spec is None:
                print(f"{case.name}: no model at {case.spec}")
                continue
            run.make()
            for part in given.only.split(","):
                {"quality": run.quality, "latency": run.speed}[part]()
        report(run)


if __name__ == "__main__":
    main()
