"""`make demo`: prune all-MiniLM-L6-v2 on text that optin brings along, with the real commands.

No hub and no data set: the model comes from a package, the text is `builtin:prose`. Ends in one table. Run again, it
reuses everything that is done.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from optin_cli import console

MODEL, DATA = "demo:minilm", "builtin:prose"
BUDGETS = ("0.7", "0.5")
BATCH, LENGTH = "32", "64"
FOLDER = Path("demo")


def optin(*arguments: str) -> dict[str, Any]:
    """Show and run one command; progress goes to the terminal, its JSON comes back."""
    console.note(f"\n$ optin {shlex.join(arguments)}")
    command = [sys.executable, "-m", "optin_cli", *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def main() -> None:
    started = time.monotonic()
    FOLDER.mkdir(exist_ok=True)
    ranking = str(FOLDER / "minilm.h5")
    optin("score", MODEL, "--data", DATA, "-o", ranking)
    rows = []
    for budget in BUDGETS:
        name = f"minilm-{budget.replace('0.', '')}0"
        mask, model = str(FOLDER / f"{name}.mask.json"), str(FOLDER / name)
        optin("select", ranking, "--flops", budget, "-o", mask)
        optin("apply", MODEL, mask, "-o", model)
        quality = optin("eval", model, "--baseline", MODEL, "--data", DATA, "--split", "validation")
        timings = optin("bench", model, "--baseline", MODEL, "--batch-size", BATCH, "--seq-len", LENGTH)
        dense, pruned = timings["timings"]
        if not rows:
            rows.append([*line("dense", dense), "", "100.0", "100.0"])
        fidelity = quality["fidelity"]
        rows.append(
            [
                *line(budget, pruned),
                f"{pruned['speedup']:.2f}x",
                f"{fidelity['cosine']:.1f}",
                f"{fidelity['top10_overlap']:.1f}",
            ]
        )
    columns = ["budget", "MACs", "params", "disk", f"latency, batch {BATCH} x {LENGTH}"]
    columns += ["speed-up", "cosine %", "top-10 neighbours %"]
    console.note("")
    console.table(
        f"all-MiniLM-L6-v2, pruned without retraining ({console.duration(time.monotonic() - started)} in all)",
        columns,
        rows,
    )
    console.note(
        "\nspeed-up: over the dense model, timed in turns with each; "
        "cosine: mean cosine of pruned and dense embeddings on held-out paragraphs; "
        "top-10 neighbours: how many of each paragraph's ten nearest stay the same.\n"
        f"The models are in {FOLDER}/: optin_cli.load('{FOLDER}/minilm-50') gives a ready one."
    )


def line(name: str, timing: dict[str, Any]) -> list[str]:
    return [
        name,
        console.count(timing["macs"]),
        console.count(timing["params"]),
        console.size(timing["disk_bytes"]),
        f"{timing['median_ms']:.1f} ms",
    ]


if __name__ == "__main__":
    main()
