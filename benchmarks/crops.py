"""What a pruned image classifier is worth on images of another crop or resolution than it was calibrated on.

    python benchmarks/crops.py [--shared ../shared] [--cells benchmarks/crops] [--rows 1024]
                               [--budgets 0.5,0.3] [--measured 1000]
    python benchmarks/crops.py --report        # the table from the cells that are there

The zoo's ViT on CIFAR-10. It takes one size alone, so the content of that size changes: the image as it is, its
middle three quarters enlarged (`crop`), and the image at half of its resolution (`half`). Train images calibrate,
test images measure. `before` is the compensation of old: ridges from 1e-8 on. The sister of lengths.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
from cells import Cells, parser_of
from lengths import WHEN, wanted
from PIL import Image

from optin_cli.artefacts.ranking import Ranking
from optin_cli.compensation.plan import make_plan as plan_compensation
from optin_cli.compensation.settings import Compensation
from optin_cli.data.batches import Batches
from optin_cli.data.opening import as_data, open_batches
from optin_cli.data.sources import DataSpec
from optin_cli.loading.checkpoint import OpenModel, open_model
from optin_cli.measure.evaluate import evaluate
from optin_cli.pipeline import score
from optin_cli.pruning.apply import prune_model
from optin_cli.scoring.plan import ScoreSettings, make_plan
from optin_cli.selection.select import select
from optin_cli.selection.settings import Request

NAME = "vit"
MODEL = Path(__file__).parent / "zoo" / "vit-cifar10"


def cropped(image: Image.Image) -> Image.Image:
    """The middle three quarters, as large as the image was."""
    width, height = image.size
    edges = width // 8, height // 8, width - width // 8, height - height // 8
    return image.resize(image.size, Image.Resampling.BICUBIC, box=edges)


def halved(image: Image.Image) -> Image.Image:
    """Half as many pixels a side, as large as the image was."""
    few = image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC)
    return few.resize(image.size, Image.Resampling.BICUBIC)


KINDS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "whole": lambda image: image,
    "crop": cropped,
    "half": halved,
}


class Runner:
    """Prunes and measures the model."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.dense = self._open()
        self.measured = {kind: self._batches(kind) for kind in KINDS}
        self.calibrations: dict[str, tuple[DataSpec, Ranking]] = {}

    def _open(self) -> OpenModel:
        return open_model(str(MODEL), device="cpu", dtype="float32")

    def _images(self, split: str, kind: str, count: int) -> datasets.Dataset:
        path = str(self.options.shared / "data" / "cifar10" / f"{split}.parquet")
        found = datasets.load_dataset("parquet", data_files=path, split="train")
        chosen = found.shuffle(seed=0).select(range(count))
        return chosen.map(lambda row: {**row, "image": KINDS[kind](row["image"])})

    def _batches(self, kind: str) -> Batches:
        data = as_data(self._images("test", kind, self.options.measured))
        return open_batches(data, self.dense, None, 128, 0)

    def run(self, kind: str, budget: float, when: str) -> dict[str, Any]:
        if kind not in self.calibrations:
            images = as_data(self._images("train", kind, self.options.rows))
            plan = make_plan(self._open(), images, ScoreSettings(samples=256))
            self.calibrations[kind] = images, score(plan)
        data, ranking = self.calibrations[kind]
        mask = select(ranking, Request(flops=budget))
        model, started = self._open(), time.perf_counter()
        settings = Compensation(samples=self.options.rows, **WHEN[when])
        pruned = prune_model(model, mask, plan=plan_compensation(model, mask, settings, data))
        seconds = time.perf_counter() - started
        found = {name: evaluate(pruned, batches, self.dense) for name, batches in self.measured.items()}
        return {
            "kinds": {
                name: {"top1": one.metrics["top1"], "dense": one.baseline_metrics["top1"], **one.fidelity}
                for name, one in found.items()
            },
            "rows": self.options.rows,
            "measured": self.options.measured,
            "seconds": round(seconds, 1),
        }


def measure(options: argparse.Namespace) -> None:
    runner, cells = None, Cells(options.cells, NAME)
    for kind, budget, when in wanted(options):
        key = f"{kind}/{budget:g}/{when}"
        if key in cells.found:
            continue
        runner = runner or Runner(options)
        cell = runner.run(kind, budget, when)
        cells.put(key, cell)
        shown = ", ".join(f"{name}: {one['top1']:.1f}" for name, one in cell["kinds"].items())
        print(f"{key}: {shown} ({cell['seconds']} s)", file=sys.stderr, flush=True)


def report(folder: Path) -> None:
    """A row for each calibration and budget: top-1 and divergence, `before -> after` in each cell."""
    cells = Cells(folder, NAME).found
    print(f"| calibrated on, MACs kept | {' | '.join(f'{kind}, top-1 | KL' for kind in KINDS)} |")
    print("|---" * (1 + 2 * len(KINDS)) + "|")
    for one in list(cells.values())[:1]:
        dense = (f"{one['kinds'][kind]['dense']:.1f} |" for kind in KINDS)
        print(f"| dense | {' | '.join(dense)} |")
    for budget in sorted({key.split("/")[1] for key in cells}, reverse=True):
        for kind in KINDS:
            both = [cells.get(f"{kind}/{budget}/{when}") for when in WHEN]
            if all(both):
                old, new = (cell["kinds"] for cell in both)
                row = (
                    f"{old[name]['top1']:.1f} -> {new[name]['top1']:.1f} | "
                    f"{old[name]['kl']:.3f} -> {new[name]['kl']:.3f}"
                    for name in KINDS
                )
                print(f"| {kind}, {budget} | {' | '.join(row)} |")


def main() -> None:
    parser = parser_of(__doc__, "crops")
    parser.add_argument("--rows", type=int, default=1024, help="train images to refit on")
    parser.add_argument("--measured", type=int, default=1000, help="test images")
    parser.add_argument("--budgets", default="0.5,0.3")
    parser.add_argument("--calibrations", default="whole,crop")
    options = parser.parse_args()
    if not options.report:
        measure(options)
    report(options.cells)


if __name__ == "__main__":
    main()
