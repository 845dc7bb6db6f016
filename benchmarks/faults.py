"""Faults, injected and counted: signals, full disks, folders that vanish, damaged files; long runs, and memory.

    python benchmarks/faults.py --damaged 3400 --signals 20 --disks 20 --soak 200 --memory

Prints Markdown tables for docs/reliability.md; outcomes in capitals are faults of optin. Every run draws its faults
anew; `--seed` repeats one. A damaged file has to be read as it was or refused with one of optin's errors, within the
time limit. After anything else there is never a damaged file under a final name, and a rerun gives what an undisturbed
run gave. Commands run in processes that are forked from this one, where every library is imported already.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # threads do not survive a fork
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from faults_parts import endurance, injected
from faults_parts.damage import damaged_files
from faults_parts.pipeline import commands, warmed


def table(found: dict[str, Counter[str]]) -> list[str]:
    rows = ["| fault | tried | outcome |", "|---|---|---|"]
    for what, outcomes in found.items():
        said = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
        rows.append(f"| {what} | {sum(outcomes.values())} | {said} |")
    tried = sum(sum(outcomes.values()) for outcomes in found.values())
    lost = sum(n for outcomes in found.values() for outcome, n in outcomes.items() if outcome[:3].isupper())
    return [*rows, f"| all | {tried} | {lost} lost |"]


def show(title: str, lines: list[str]) -> None:
    print(f"\n{title}\n", *lines, sep="\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--damaged", type=int, default=0, help="damaged files of each kind")
    parser.add_argument("--signals", type=int, default=0, help="signals of each kind to each command")
    parser.add_argument(
        "--disks", type=int, default=0, help="full disks and vanishing folders for each command"
    )
    parser.add_argument("--soak", type=int, default=0, help="pipelines in a row")
    parser.add_argument(
        "--memory", action="store_true", help="peak memory of each command as the model grows"
    )
    parser.add_argument("--only", help="signals, disks and folders for these commands alone: score,export")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "tmp").mkdir(mode=0o777)
        (folder / "tmp").chmod(0o777)
        tempfile.tempdir = os.environ["TMPDIR"] = str(folder / "tmp")
        os.environ["HF_DATASETS_CACHE"] = str(folder / "tmp" / "datasets")
        import datasets

        datasets.config.HF_DATASETS_CACHE = folder / "tmp" / "datasets"
        os.chdir(folder)
        steps, draw = commands(folder), random.Random(options.seed)
        warmed(steps)
        hit = [step for step in steps if not options.only or step.name in options.only.split(",")]
        started = time.perf_counter()
        if options.signals:
            show("signals", table(injected.signals(hit, options.signals, draw)))
        if options.disks:
            show("full disks", table(injected.full_disks(hit, options.disks, draw)))
            show("folders that vanish", table(injected.vanishing(hit, options.disks, draw)))
            show("folders that can't be written", table(injected.read_only(hit, max(1, options.disks // 10))))
        if options.damaged:
            (folder / "files").mkdir()
            found = damaged_files(
                folder / "files", folder / "work" / "small" / "small", options.damaged, options.seed
            )
            show("damaged files", table(found))
        left = [path.name for path in (folder / "tmp").glob("optin-*")]
        print(
            f"\nseed {options.seed}, {time.perf_counter() - started:.0f} s; scratch folders left: {len(left)}"
        )
        if options.soak:
            show("soak", endurance.soak(steps, options.soak))
        if options.memory:
            show("memory", endurance.growth(folder, lambda text: print(text, file=sys.stderr)))


if __name__ == "__main__":
    main()
