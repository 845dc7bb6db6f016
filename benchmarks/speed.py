"""How fast pruned models are, and their share of the ideal: time as the MACs of the blocks.

    python benchmarks/speed.py [--cells benchmarks/speed] [--models minilm,mpnet,vit,resnet,vgg,efficientnet]
                               [--budgets 0.7,0.5,0.3] [--batches 1,32] [--seconds 10] [--device cpu] [--threads 2]
    python benchmarks/speed.py --report        # tables from the cells that are there

Sizes alone decide about time, so units are scored by magnitude and nothing is refitted; what is not in a package or in
zoo/ has random weights: MPNet's base shape, VGG-11, and EfficientNet-Lite0. All variants of a budget are timed beside
the dense model in the same rounds. `plain` keeps any number of units, as was the only way on a CPU; `to 8` and `to 16`
keep channels and neurons in such multiples; `auto` is `--round-to auto`. `fused` is `auto` with BatchNorms folded, and
`fused, channels last` stores maps so, too: both beside a dense model in the same form. Cells go into a JSON file for
each model one by one, so a run that is stopped goes on. Let nothing else run.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cells import Cells, parser_of
from torch import nn

import optin_cli as optin
from optin_cli.loading.checkpoint import OpenModel, fuse_model
from optin_cli.measure.inputs import default_size, draw
from optin_cli.measure.latency import bench, ideal_speedup, speedup, speedup_interval

ZOO = Path(__file__).parent / "zoo"
TITLES = {
    "minilm": "all-MiniLM-L6-v2, 64 tokens",
    "mpnet": "MPNet's base shape, 64 tokens",
    "vit": "our own ViT, 32 px",
    "vit-s": "ViT-S/16, 224 px",
    "resnet": "our own ResNet, 64 px",
    "vgg": "VGG-11, 32 px",
    "efficientnet": "EfficientNet-Lite0, 224 px",
}
CNNS = ("resnet", "vgg", "efficientnet")
ROUNDED = {"plain": 1, "to 8": 8, "to 16": 16, "auto": "auto"}
FORMS = {"fused": False, "fused, channels last": True}
"""Of CNNs: whether maps are stored with their channels last."""


def open_dense(name: str, device: str) -> OpenModel:
    torch.manual_seed(0)
    if name == "minilm":
        return optin.open_model("demo:minilm", device=device)
    if name == "mpnet":
        from transformers import MPNetConfig, MPNetModel

        tokenizer = optin.open_model("demo:minilm").processor.tokenizer
        return optin.open_model(MPNetModel(MPNetConfig()).eval(), processor=tokenizer, device=device)
    if name in ("vit", "resnet"):
        return optin.open_model(str(ZOO / f"{name}-cifar10"), device=device)
    import timm

    made: dict[str, tuple[str, dict[str, Any]]] = {
        "vit-s": ("vit_small_patch16_224", {}),
        "vgg": ("vgg11_bn", {"mlp_ratio": 1 / 64, "num_classes": 10}),
        "efficientnet": ("tf_efficientnet_lite0", {}),
    }
    architecture, options = made[name]
    module = timm.create_model(architecture, **options)
    if name == "vgg":
        module.pretrained_cfg["input_size"] = module.default_cfg["input_size"] = (3, 32, 32)
    return optin.open_model(module.eval(), task="image-classification", device=device)


def in_form(model: OpenModel, channels_last: bool) -> OpenModel:
    """A copy with its BatchNorms folded, its maps perhaps stored with channels last."""
    made = replace(model, module=copy.deepcopy(model.module))
    fuse_model(made)
    if channels_last:
        made.module.to(memory_format=torch.channels_last)
    return made


class Runner:
    """Prunes and times one model."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.options = name, options
        self.dense = open_dense(name, options.device)
        self.size = 64 if self.dense.family.modality == "text" else default_size(self.dense)
        batches = [draw(self.dense, 4, self.size, seed) for seed in (0, 1)]
        self.ranking = optin.score(self.dense, batches, method="magnitude", samples=8)
        self.batches = batches

    def pruned(self, budget: float, round_to: int | str) -> OpenModel:
        mask = optin.select(self.ranking, flops=budget, round_to=round_to)
        return optin.apply(self.dense, mask, self.batches, compensate="none")

    def run(self, budget: float, batch: int) -> dict[str, Any]:
        """Variant -> its times beside the dense model of its form."""
        found: dict[str, Any] = {}
        small = {name: self.pruned(budget, size) for name, size in ROUNDED.items()}
        found |= self._timed(self.dense, small, batch)
        if self.name in CNNS:
            for form, channels_last in FORMS.items():
                ours = {form: in_form(small["auto"], channels_last)}
                found |= self._timed(in_form(self.dense, channels_last), ours, batch)
        return found

    def _timed(self, dense: OpenModel, small: dict[str, OpenModel], batch: int) -> dict[str, Any]:
        models = [dense, *small.values()]
        effort = {"repeats": 10, "seconds": self.options.seconds}
        theirs, *ours = bench(models, [batch], [self.size], **effort)
        found = {}
        for name, model, timing in zip(small, models[1:], ours, strict=True):
            ideal = ideal_speedup(dense, model, self.size)
            found[name] = {
                "dense_ms": theirs.median_ms,
                "ms": timing.median_ms,
                "speedup": speedup(theirs, timing),
                "interval": list(speedup_interval(theirs, timing)),
                "ideal": ideal,
                "of_ideal": speedup(theirs, timing) / ideal,
                "rounds": timing.rounds,
                "norms": sum(isinstance(one, nn.BatchNorm2d) for one in model.module.modules()),
            }
        return found


def wanted(options: argparse.Namespace) -> Iterator[tuple[float, int]]:
    for batch in map(int, options.batches.split(",")):
        for budget in map(float, options.budgets.split(",")):
            yield budget, batch


def measure(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    for name in options.models.split(","):
        runner, cells = None, Cells(options.cells, name)
        for budget, batch in wanted(options):
            key = f"{budget:g}/{batch}/{options.device}/{options.threads}"
            if key in cells.found:
                continue
            runner = runner or Runner(name, options)
            cell = runner.run(budget, batch)
            cells.put(key, cell)
            texts = (
                f"{variant} {one['speedup']:.2f}x ({one['of_ideal']:.2f})" for variant, one in cell.items()
            )
            print(f"{name}/{key}: {', '.join(texts)}", file=sys.stderr, flush=True)


def report(folder: Path) -> None:
    """For each model a row a budget and batch size: the speed-up, and in brackets its share of the ideal."""
    names = [*ROUNDED, *FORMS]
    print(f"| model | MACs kept | batch | dense ms | {' | '.join(names)} |")
    print("|---" * (len(names) + 4) + "|")
    for model, title in TITLES.items():
        for key, cell in sorted(Cells(folder, model).found.items(), key=order):
            budget, batch, *_ = key.split("/")
            texts = [
                f"{cell[name]['speedup']:.2f}x ({cell[name]['of_ideal']:.2f})" if name in cell else ""
                for name in names
            ]
            dense = cell["plain"]["dense_ms"]
            print(f"| {title} | {budget} | {batch} | {dense:.1f} | {' | '.join(texts)} |")


def order(entry: tuple[str, Any]) -> tuple[int, float]:
    budget, batch, *_ = entry[0].split("/")
    return int(batch), -float(budget)


def main() -> None:
    parser = parser_of(__doc__, "speed", shared=False)
    parser.add_argument("--models", default="minilm,mpnet,vit,resnet,vgg,efficientnet")
    parser.add_argument("--budgets", default="0.7,0.5,0.3")
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if not options.report:
        measure(options)
    report(options.cells)


if __name__ == "__main__":
    main()
