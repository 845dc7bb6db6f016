"""Time and peak memory of every stage as models grow, by the commands that a user runs.

    python benchmarks/sizes.py WORK [--shared ../shared] [--mpnet FOLDER] [--gemma FOLDER]
                                    [--models minilm,mpnet,gemma,bert-large] [--cells benchmarks/sizes]
    python benchmarks/sizes.py --report             # the table from the cells that are there

Every model reads the same 512 sentences of stsb's train split, by the defaults of `score`, `select --flops 0.5` and
`apply`. Peak memory is the resident one of the process, Python and its libraries included. BERT-large has random
weights: how long it takes does not ask what they are. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from cells import Case, Cells

import optin_cli as optin
from optin_cli.artefacts.latency import processor_name

CASES = {
    "minilm": Case("minilm", "demo:minilm", "data/stsb", "", "", "all-MiniLM-L6-v2, 6 x 384"),
    "mpnet": Case("mpnet", "", "data/stsb", "", "", "all-mpnet-base-v2, 12 x 768"),
    "gemma": Case("gemma", "", "data/stsb", "", "", "Gemma 3 270M, 18 x 640"),
    "bert-large": Case("bert-large", "", "data/stsb", "", "", "BERT-large's shape, 24 x 1,024"),
}
STAGES = ("score", "select", "apply")
_WAIT = """
import os, subprocess, sys, time
started = time.perf_counter()
process = subprocess.Popen(sys.argv[1:])
_, status, usage = os.wait4(process.pid, 0)
print(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""
"""A small process in between: the peak of a new one begins at that of the one that starts it."""


def random_bert_large(path: Path) -> str:
    """A folder of BERT-large's shape with MiniLM's tokenizer."""
    import transformers

    if not path.is_dir():
        tokenizer = optin.open_model("demo:minilm").processor.tokenizer
        sizes: dict[str, Any] = {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        }
        config = transformers.BertConfig(vocab_size=len(tokenizer), **sizes)
        transformers.BertForSequenceClassification(config).save_pretrained(path)
        tokenizer.save_pretrained(path)
    return str(path)


def commands(model: str, data: Path, work: Path) -> dict[str, list[str]]:
    """Stage -> its arguments."""
    ranking, mask = str(work / "ranking.h5"), str(work / "mask.json")
    return {
        "score": ["score", model, "--data", str(data), "-o", ranking, "--force"],
        "select": ["select", ranking, "--flops", "0.5", "-o", mask, "--force"],
        "apply": ["apply", model, mask, "-o", str(work / "pruned"), "--force"],
    }


def run(arguments: list[str]) -> dict[str, float]:
    """Wall and processor seconds, and peak GB, of a command of its own process."""
    command = [sys.executable, "-c", _WAIT, sys.executable, "-m", "optin_cli", *arguments, "-q"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"`optin {' '.join(arguments)}` ended with {done.returncode}")
    wall, cpu, peak = map(float, done.stdout.split()[-3:])
    return {"wall": round(wall, 1), "cpu": round(cpu, 1), "peak_gb": round(peak / 1e6, 2)}


def block_parameters(model: str) -> int:
    """Those in the blocks: what the stages compute with."""
    opened = optin.open_model(model)
    blocks = (opened.module.get_submodule(path) for path in dict.fromkeys(opened.anatomy.blocks))
    return sum(parameter.numel() for block in blocks for parameter in block.parameters())


def measure(options: argparse.Namespace) -> None:
    folders = {
        "minilm": "demo:minilm",
        "mpnet": options.mpnet and str(options.mpnet),
        "gemma": options.gemma and str(options.gemma),
    }
    for name in options.models.split(","):
        case = CASES[name]
        model = random_bert_large(options.work / name) if name == "bert-large" else folders[name]
        if not model:
            print(f"{name} is left out: give its folder (--{name})", file=sys.stderr)
            continue
        cells, work = Cells(options.cells, case), options.work / f"{name}-work"
        work.mkdir(parents=True, exist_ok=True)
        for stage, arguments in commands(model, options.shared / case.data, work).items():
            if stage in cells.found and stage not in options.again:
                continue
            cell = run(arguments) | {
                "parameters": block_parameters(model),
                "threads": os.cpu_count(),
                "machine": processor_name(),
                "date": f"{datetime.date.today()}",
            }
            cells.put(stage, cell)
            print(f"{name}/{stage}: {cell}", file=sys.stderr)


def exponent(small: dict[str, Any], large: dict[str, Any], what: str) -> float:
    """By which power of the parameters in blocks a quantity grows from one model to the other."""
    return math.log(large[what] / small[what]) / math.log(large["parameters"] / small["parameters"])


def report(folder: Path) -> None:
    found = {name: Cells(folder, case).found for name, case in CASES.items()}
    print(
        "| model | parameters in blocks | " + " | ".join(f"{stage}, s | peak, GB" for stage in STAGES) + " |"
    )
    print("|---" * (2 + 2 * len(STAGES)) + "|")
    for name, cells in found.items():
        if cells:
            told = (
                f"{cells[s]['wall']:.0f} | {cells[s]['peak_gb']:.2f}" if s in cells else " | " for s in STAGES
            )
            millions = next(iter(cells.values()))["parameters"] / 1e6
            print(f"| {CASES[name].title} | {millions:.1f} M | " + " | ".join(told) + " |")
    small = found["minilm"]
    for name in ("mpnet", "gemma", "bert-large"):
        for stage in ("score", "apply"):
            if stage in small and stage in found[name]:
                told = {what: exponent(small[stage], found[name][stage], what) for what in ("cpu", "peak_gb")}
                print(
                    f"- {stage}, MiniLM to {name}: processor time grows with the parameters to the {told['cpu']:.2f}, "
                    f"peak memory to the {told['peak_gb']:.2f}"
                )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, nargs="?", help="keeps rankings, masks and models")
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--cells", type=Path, default=Path("benchmarks/sizes"))
    parser.add_argument("--models", default=",".join(CASES))
    parser.add_argument("--mpnet", type=Path, help="folder of all-mpnet-base-v2")
    parser.add_argument("--gemma", type=Path, help="folder of Gemma 3 270M")
    parser.add_argument("--again", default="", help="stages to measure again, though their cells are there")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    if not options.report:
        if options.work is None:
            parser.error("WORK is missing")
        measure(options)
    report(options.cells)


if __name__ == "__main__":
    main()
