"""Time and peak memory of every stage as models grow, by the commands that a user runs.

    python benchmarks/sizes.py WORK [--shared ../shared] [--mpnet FOLDER] [--gemma FOLDER]
                                    [--models minilm,mpnet,gemma,bert-large] [--cells benchmarks/sizes]
    python benchmarks/sizes.py --report             # the table from the cells that are there

Every model reads the same 512 sentences of stsb's train split, by the defaults of `score`, `select --flops 0.5` and
`apply`; a language model as many windows of 128 tokens of them. Peak memory is the resident one of the process, Python
and its libraries included. BERT-large has random weights: how long it takes does not ask what they are. Run it on a
machine that does nothing else.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import math
import os
import sys
from pathlib import Path
from typing import Any

import processes
from cells import Case, Cells, parser_of
from scoring import random_bert

import optin_cli as optin
from optin_cli.artefacts.latency import processor_name

CASES = {
    "minilm": Case("minilm", "demo:minilm", "data/stsb", "", "", "all-MiniLM-L6-v2, 6 x 384"),
    "mpnet": Case("mpnet", "", "data/stsb", "", "", "all-mpnet-base-v2, 12 x 768"),
    "gemma": Case("gemma", "", "data/stsb", "", "", "Gemma 3 270M, 18 x 640, windows of 128 tokens"),
    "bert-large": Case("bert-large", "", "data/stsb", "", "", "BERT-large's shape, 24 x 1,024"),
}
STAGES = ("score", "select", "apply")
WINDOWS = {"gemma": ["--max-length", "128"]}


def commands(model: str, data: Path, work: Path, cut: list[str]) -> dict[str, list[str]]:
    """Stage -> its arguments; `cut` says how long windows are."""
    ranking, mask = str(work / "ranking.h5"), str(work / "mask.json")
    return {
        "score": ["score", model, "--data", str(data), "-o", ranking, "--force", *cut],
        "select": ["select", ranking, "--flops", "0.5", "-o", mask, "--force"],
        "apply": ["apply", model, mask, "-o", str(work / "pruned"), "--force", *cut],
    }


def block_parameters(model: optin.OpenModel) -> int:
    """Those in the blocks: what the stages compute with."""
    blocks = (model.module.get_submodule(path) for path in dict.fromkeys(model.anatomy.blocks))
    return sum(parameter.numel() for block in blocks for parameter in block.parameters())


def opened(name: str, options: argparse.Namespace) -> optin.OpenModel | None:
    """None where its folder is not given."""
    if name == "bert-large":
        return random_bert(options.work, 24, 1024, heads=16)
    spec = CASES[name].spec or getattr(options, name)
    return optin.open_model(str(spec)) if spec else None


def measure(options: argparse.Namespace) -> None:
    options.work.mkdir(parents=True, exist_ok=True)
    for name in options.models.split(","):
        cells = Cells(options.cells, name)
        if all(stage in cells.found for stage in STAGES):
            continue
        model = opened(name, options)
        if model is None:
            print(f"{name} is left out: give its folder (--{name})", file=sys.stderr)
            continue
        facts = {
            "parameters": block_parameters(model),
            "threads": os.cpu_count(),
            "machine": processor_name(),
            "date": f"{datetime.date.today()}",
        }
        spec, work = CASES[name].spec or str(model.source.folder), options.work / f"{name}-work"
        work.mkdir(exist_ok=True)
        data = options.shared / CASES[name].data
        for stage, arguments in commands(spec, data, work, WINDOWS.get(name, [])).items():
            if stage not in cells.found and stage in options.stages.split(","):
                spent = processes.run([sys.executable, "-m", "optin_cli", *arguments, "-q"])
                took = {"wall": spent.wall, "cpu": spent.cpu, "peak_gb": spent.peak * 2**20 / 1e9}
                cells.put(stage, {key: round(value, 2) for key, value in took.items()} | facts)
                print(f"{name}/{stage}: {cells.found[stage]}", file=sys.stderr)


def exponent(small: dict[str, Any], large: dict[str, Any], what: str) -> float:
    """By which power of the parameters in blocks a quantity grows from one model to the other."""
    return math.log(large[what] / small[what]) / math.log(large["parameters"] / small["parameters"])


def report(folder: Path) -> None:
    found = {name: Cells(folder, name).found for name in CASES}
    print(
        "| model | parameters in blocks | " + " | ".join(f"{stage}, s | peak, GB" for stage in STAGES) + " |"
    )
    print("|---" * (2 + 2 * len(STAGES)) + "|")
    measured = [name for name, cells in found.items() if cells]
    for name in measured:
        cells = found[name]
        told = (
            f"{cells[s]['wall']:.0f} | {cells[s]['peak_gb']:.2f}" if s in cells else " | " for s in STAGES
        )
        millions = next(iter(cells.values()))["parameters"] / 1e6
        print(f"| {CASES[name].title} | {millions:.1f} M | " + " | ".join(told) + " |")
    print()
    for one, two in itertools.pairwise(sorted(measured, key=lambda name: found[name]["score"]["parameters"])):
        for stage in ("score", "apply"):
            if stage in found[one] and stage in found[two]:
                powers = (exponent(found[one][stage], found[two][stage], what) for what in ("cpu", "peak_gb"))
                time, memory = (f"{power:.2f}" for power in powers)
                print(
                    f"- {stage}, {one} to {two}: processor time grows with the parameters to the {time}, "
                    f"peak memory to the {memory}"
                )


def main() -> None:
    parser = parser_of(__doc__, "sizes")
    parser.add_argument("work", type=Path, nargs="?", help="keeps rankings, masks and models")
    parser.add_argument("--models", default=",".join(CASES))
    parser.add_argument("--mpnet", type=Path, help="folder of all-mpnet-base-v2")
    parser.add_argument("--gemma", type=Path, help="folder of Gemma 3 270M")
    parser.add_argument("--stages", default=",".join(STAGES))
    options = parser.parse_args()
    if not options.report:
        if options.work is None:
            parser.error("WORK is missing")
        measure(options)
    report(options.cells)


if __name__ == "__main__":
    main()
