"""Which data to calibrate on: built-in docstrings, built-in prose, general prose, the model's own domain.

    python benchmarks/calibration.py [--shared ../shared] [--cells benchmarks/calibration] [--models minilm,sst2,mpnet]
                                     [--mpnet FOLDER] [--calibrations docs,own] [--budgets 0.5] [--seeds 0]
                                     [--device cpu]
    python benchmarks/calibration.py --report      # tables from the cells that are there

Everything is pruned by the defaults of every stage. A model is measured by its own task (STS Benchmark's test split,
Spearman; SST-2's validation split, accuracy) and by its likeness to the dense model, on its own domain, on paragraphs
of Brown's test split and on docstrings that did not calibrate: the mean cosine of embeddings, or the share of texts
with the same class. Pairs are the two halves of Brown's paragraphs: how often a first half is nearest to its second.
Cells go into a JSON file for each model one by one, so a run that is stopped goes on.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cells import Cells, parser_of

import optin_cli as optin
from optin_cli.data.docs import split_sentences
from optin_cli.data.opening import as_data, open_batches
from optin_cli.data.sources import DataSpec
from optin_cli.loading.checkpoint import OpenModel

CALIBRATIONS = {
    "docs": "`builtin:docs`",
    "prose": "`builtin:prose`",
    "brown": "Brown prose",
    "own": "its own domain",
}
DOMAINS = {"minilm": ("stsb", "test"), "sst2": ("sst2", "validation"), "mpnet": ("stsb", "test")}
TITLES = {"minilm": "all-MiniLM-L6-v2", "sst2": "minilm-l6-sst2", "mpnet": "all-mpnet-base-v2"}
_MEASURED, _PAIRS = 400, 300
_SENTENCE = re.compile(r"(?<=[.!?;])\s+")


def calibration_data(name: str, model: str, shared: Path) -> DataSpec:
    places = {
        "docs": DataSpec("builtin:docs"),
        "prose": DataSpec("builtin:prose"),
        "brown": DataSpec(str(shared / "data" / "brown" / "train.txt")),
    }
    return places.get(name) or DataSpec(str(shared / "data" / DOMAINS[model][0]), "train")


def paragraphs(shared: Path) -> list[str]:
    return (shared / "data" / "brown" / "test.txt").read_text().splitlines()


def halves(shared: Path) -> list[tuple[str, str]]:
    """Paragraphs of four sentences or more, cut in the middle."""
    found = []
    for paragraph in paragraphs(shared):
        parts = _SENTENCE.split(paragraph)
        if len(parts) >= 4:
            middle = len(parts) // 2
            found.append((" ".join(parts[:middle]), " ".join(parts[middle:])))
    return random.Random(2).sample(found, _PAIRS)


class Runner:
    """Prunes and measures one model."""

    def __init__(self, name: str, spec: str, options: argparse.Namespace) -> None:
        self.name, self.options = name, options
        self.dense = optin.open_model(spec, device=options.device)
        source, split = DOMAINS[name]
        self.own = DataSpec(str(options.shared / "data" / source), split)
        brown = random.Random(1).sample(paragraphs(options.shared), _MEASURED)
        docs = random.Random(1).sample(split_sentences("validation"), _MEASURED)
        self.others = {"brown": brown, "docs": docs}
        self.pairs = halves(options.shared) if source == "stsb" else []

    def run(self, calibration: str, budget: float, seed: int) -> dict[str, Any]:
        started = time.perf_counter()
        data = calibration_data(calibration, self.name, self.options.shared)
        small = optin.prune(self.dense, data, flops=budget, seed=seed)
        seconds = time.perf_counter() - started
        own = optin.evaluate(small, self.own, baseline=self.dense)
        cell = {
            "metric": own.metrics[own.main],
            "dense": own.baseline_metrics[own.main],
            "alike": {"own": likeness(own)},
            "unlike": own.unlike,
            "seconds": round(seconds, 1),
            "device": self.options.device,
        }
        for kind, texts in self.others.items():
            cell["alike"][kind] = likeness(optin.evaluate(small, texts, baseline=self.dense))
        if self.pairs:
            cell["pairs"], cell["dense pairs"] = self._found(small), self._found(self.dense)
        return cell

    def _found(self, model: OpenModel) -> float:
        """Per cent of first halves that are nearest to their own second half."""
        firsts, seconds = (embedded(model, [pair[side] for pair in self.pairs]) for side in (0, 1))
        nearest = (firsts @ seconds.T).argmax(dim=1)
        return 100 * float((nearest == torch.arange(len(self.pairs))).double().mean())


def likeness(found: Any) -> float:
    return found.fidelity.get("cosine", found.fidelity.get("agreement"))


@torch.inference_mode()
def embedded(model: OpenModel, texts: list[str]) -> torch.Tensor:
    """[texts, d], of length 1."""
    found: dict[int, torch.Tensor] = {}
    for batch in open_batches(as_data(texts), model, None, 32, 0):
        found |= zip(batch.example_ids, model.output(batch.to(model.device).inputs)[:, 0].cpu(), strict=True)
    rows = torch.stack([found[example] for example in range(len(texts))])
    return torch.nn.functional.normalize(rows, dim=-1)


def wanted(options: argparse.Namespace) -> Iterator[tuple[str, float, int]]:
    for budget in map(float, options.budgets.split(",")):
        for seed in map(int, options.seeds.split(",")):
            for calibration in options.calibrations.split(","):
                yield calibration, budget, seed


def measure(options: argparse.Namespace) -> None:
    specs = {
        "minilm": "demo:minilm",
        "sst2": str(options.shared / "models" / "minilm-l6-sst2"),
        "mpnet": options.mpnet and str(options.mpnet),
    }
    for name in options.models.split(","):
        if not specs[name]:
            print(f"left out: {name} (no folder given)", file=sys.stderr)
            continue
        runner, cells = None, Cells(options.cells, name)
        for calibration, budget, seed in wanted(options):
            key = f"{calibration}/{budget:g}/{seed}"
            if key in cells.found:
                continue
            runner = runner or Runner(name, specs[name], options)
            cell = runner.run(calibration, budget, seed)
            cells.put(key, cell)
            print(f"{name}/{key}: {cell['metric']:.2f} ({cell['seconds']} s)", file=sys.stderr, flush=True)


def report(folder: Path) -> None:
    """A table of all models and budgets: means over the seeds that are there."""
    print("| model, MACs kept | calibrated on | own metric | own | Brown | docstrings | pairs |")
    print("|---|---|---|---|---|---|---|")
    for name, title in TITLES.items():
        cells = Cells(folder, name).found
        for budget in sorted({key.split("/")[1] for key in cells}, reverse=True):
            for calibration, words in CALIBRATIONS.items():
                some = [cell for key, cell in cells.items() if key.startswith(f"{calibration}/{budget}/")]
                if some:
                    print(f"| {title}, {budget} | {words} | {' | '.join(row(some))} |")


def row(cells: list[dict[str, Any]]) -> list[str]:
    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    texts = [f"{mean([cell['metric'] for cell in cells]):.2f} (dense {cells[0]['dense']:.2f})"]
    texts += [f"{mean([cell['alike'][kind] for cell in cells]):.1f}" for kind in ("own", "brown", "docs")]
    if "pairs" not in cells[0]:
        return [*texts, ""]
    return [*texts, f"{mean([cell['pairs'] for cell in cells]):.1f} (dense {cells[0]['dense pairs']:.1f})"]


def main() -> None:
    parser = parser_of(__doc__, "calibration")
    parser.add_argument("--models", default="minilm,sst2,mpnet")
    parser.add_argument("--mpnet", type=Path, help="folder of all-mpnet-base-v2")
    parser.add_argument("--calibrations", default=",".join(CALIBRATIONS))
    parser.add_argument("--budgets", default="0.5")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if not options.report:
        measure(options)
    report(options.cells)


if __name__ == "__main__":
    main()
