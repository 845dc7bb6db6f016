"""What a pruned model is worth on other texts than it was calibrated on: longer ones, and ones of another kind.

    python benchmarks/lengths.py [--shared ../shared] [--cells benchmarks/lengths] [--models minilm,mpnet]
                                 [--mpnet FOLDER] [--rows 384] [--budgets 0.5,0.3] [--device cpu]
    python benchmarks/lengths.py --report      # tables from the cells that are there

Every number is the mean cosine, in points, with the dense model's embeddings. Prose is Brown: its train split
calibrates. Paragraphs of its test split, one behind the other, are cut at each length, so all lengths are of the same
texts. Docs are `builtin:docs`, own is the STS Benchmark's sentences. `before` is the compensation of old: ridges from
1e-8 on, and no joined texts. Cells go into a JSON file for each model one by one, so a run that is stopped goes on.
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import Cells, parser_of

from optin_cli.compensation.plan import make_plan as plan_compensation
from optin_cli.compensation.settings import Compensation
from optin_cli.data.docs import split_sentences
from optin_cli.data.opening import as_data, open_batches
from optin_cli.loading.checkpoint import OpenModel, open_model
from optin_cli.pipeline import score
from optin_cli.pruning.apply import PrunedModel, prune_model
from optin_cli.scoring.plan import ScoreSettings, make_plan
from optin_cli.selection.select import select
from optin_cli.selection.settings import Request

LENGTHS = (32, 64, 128, 256)
CALIBRATIONS = {
    "prose 32": ("prose", 32),
    "prose 64": ("prose", 64),
    "prose": ("prose", None),
    "docs": ("docs", None),
    "own": ("own", None),
}
WHEN: dict[str, dict[str, Any]] = {
    "before": {"ridges": (1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0), "joined": 0.0},
    "after": {},
}
_MEASURED = 150
"""Texts of each kind."""


class Texts:
    """What calibrates and what is measured on, of each kind."""

    def __init__(self, shared: Path) -> None:
        self.shared = shared

    def calibration(self, kind: str, count: int) -> list[str]:
        texts = {"prose": lambda: self._brown("train"), "docs": lambda: split_sentences("train")}
        found = texts.get(kind, lambda: self._sentences("train"))()
        return random.Random(0).sample(found, count)

    def measured(self, kind: str) -> list[str]:
        """Of prose, short texts: whole paragraphs as they come."""
        texts = {"prose": lambda: self._brown("test"), "docs": lambda: split_sentences("validation")}
        return random.Random(1).sample(texts.get(kind, lambda: self._sentences("test"))(), _MEASURED)

    @cached_property
    def long(self) -> list[str]:
        """Paragraphs of prose, one behind the other, of more characters than the longest length has."""
        found, text = [], ""
        for line in self._brown("test"):
            text = f"{text} {line}".strip()
            if len(text) > 8 * max(LENGTHS):
                found.append(text)
                text = ""
        return random.Random(1).sample(found, _MEASURED)

    def _brown(self, split: str) -> list[str]:
        return (self.shared / "data" / "brown" / f"{split}.txt").read_text().splitlines()

    def _sentences(self, split: str) -> list[str]:
        with (self.shared / "data" / "stsb" / f"{split}.csv").open(newline="") as stream:
            return [row[side] for row in csv.DictReader(stream) for side in ("sentence1", "sentence2")]


class Runner:
    """Prunes and measures one model."""

    def __init__(self, spec: str, options: argparse.Namespace) -> None:
        self.spec, self.options = spec, options
        self.texts = Texts(options.shared)
        self.dense = self._open()
        self.expected: dict[Any, torch.Tensor] = {}
        self.rankings: dict[str, Any] = {}

    def _open(self) -> OpenModel:
        return open_model(self.spec, device=self.options.device, dtype="float32")

    def run(self, calibration: str, budget: float, when: str) -> dict[str, Any]:
        kind, length = CALIBRATIONS[calibration]
        texts = self.texts.calibration(kind, self.options.rows)
        if calibration not in self.rankings:
            settings = ScoreSettings(samples=min(256, len(texts)), max_length=length)
            self.rankings[calibration] = score(make_plan(self._open(), as_data(texts), settings))
        mask = select(self.rankings[calibration], Request(flops=budget))
        model, started = self._open(), time.perf_counter()
        settings = Compensation(samples=len(texts), max_length=length, **WHEN[when])
        plan = plan_compensation(model, mask, settings, as_data(texts))
        pruned = prune_model(model, mask, plan=plan)
        seconds = time.perf_counter() - started
        return {
            "lengths": {str(cut): self._cosine(pruned, "long", self.texts.long, cut) for cut in LENGTHS},
            "kinds": {
                kind: self._cosine(pruned, kind, self.texts.measured(kind), None)
                for kind in ("prose", "docs", "own")
            },
            "rows": len(texts),
            "seconds": round(seconds, 1),
            "device": self.options.device,
        }

    def _cosine(
        self, pruned: PrunedModel, kind: str, texts: Sequence[str], cut: int | None
    ) -> dict[str, float]:
        """Mean and standard error of the cosine with the dense embeddings, in points."""
        if (kind, cut) not in self.expected:
            self.expected[kind, cut] = self._embedded(self.dense, texts, cut)
        ours = self._embedded(pruned, texts, cut)
        found = 100 * torch.cosine_similarity(self.expected[kind, cut], ours).double()
        return {"mean": float(found.mean()), "error": float(found.std() / len(found) ** 0.5)}

    @torch.inference_mode()
    def _embedded(self, model: OpenModel, texts: Sequence[str], cut: int | None) -> torch.Tensor:
        batches = open_batches(as_data(list(texts)), model, None, 32, 0, max_length=cut)
        found = torch.empty(0)
        for batch in batches:
            output = model.output(batch.to(model.device).inputs)[:, 0].cpu()
            found = output.new_zeros(len(texts), output.shape[1]) if not len(found) else found
            found[batch.example_ids] = output
        return found


def wanted(options: argparse.Namespace) -> Iterator[tuple[str, float, str]]:
    budgets = [float(budget) for budget in options.budgets.split(",")]
    names = options.calibrations.split(",") if options.calibrations else list(CALIBRATIONS)
    return ((name, budget, when) for budget in budgets for name in names for when in WHEN)


def measure(options: argparse.Namespace) -> None:
    specs = {"minilm": "demo:minilm", "mpnet": options.mpnet and str(options.mpnet)}
    for name in options.models.split(","):
        if not specs[name]:
            print(f"left out: {name} (no folder given)", file=sys.stderr)
            continue
        runner, cells = None, Cells(options.cells, name)
        for calibration, budget, when in wanted(options):
            key = f"{calibration}/{budget:g}/{when}"
            if key in cells.found:
                continue
            runner = runner or Runner(specs[name], options)
            cell = runner.run(calibration, budget, when)
            cells.put(key, cell)
            means = ", ".join(f"{cut}: {one['mean']:.1f}" for cut, one in cell["lengths"].items())
            print(f"{name}/{key}: {means} ({cell['seconds']} s)", file=sys.stderr, flush=True)


def report(folder: Path) -> None:
    """For each model and budget a row a calibration, `before -> after` in each cell."""
    for path in sorted(folder.glob("*.json")):
        cells = Cells(folder, path.stem).found
        print(f"### {path.stem}\n")
        for part, names in (("lengths", [str(cut) for cut in LENGTHS]), ("kinds", ["prose", "docs", "own"])):
            print(f"| calibrated on, MACs kept | {' | '.join(names)} |")
            print("|---" * (len(names) + 1) + "|")
            for budget in sorted({key.split("/")[1] for key in cells}, reverse=True):
                for calibration in CALIBRATIONS:
                    both = [cells.get(f"{calibration}/{budget}/{when}") for when in WHEN]
                    if all(both):
                        row = [
                            f"{both[0][part][n]['mean']:.1f} -> {both[1][part][n]['mean']:.1f}" for n in names
                        ]
                        print(f"| {calibration}, {budget} | {' | '.join(row)} |")
            print()
        errors = [one["error"] for cell in cells.values() for one in cell["lengths"].values()]
        print(
            f"Standard errors of a cell: {np.quantile(errors, 0.1):.1f} to {np.quantile(errors, 0.9):.1f}\n"
        )


def main() -> None:
    parser = parser_of(__doc__, "lengths")
    parser.add_argument("--models", default="minilm,mpnet")
    parser.add_argument("--mpnet", type=Path, help="folder of all-mpnet-base-v2")
    parser.add_argument("--rows", type=int, default=384)
    parser.add_argument("--budgets", default="0.5,0.3")
    parser.add_argument("--calibrations", default="", help=f"of {', '.join(CALIBRATIONS)}")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if not options.report:
        measure(options)
    report(options.cells)


if __name__ == "__main__":
    main()
