"""What a grid of methods, budgets and seeds found: kept cell by cell, told as tables and plots."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from optin_cli.artefacts.files import atomic_file

SEEDS = (0, 1, 2)
FIDELITY = {
    "agreement": "Same class as the dense model, %",
    "kl": "Mean KL from the dense model",
    "cosine": "Cosine with the dense embeddings, %",
}
FIDELITY_DIGITS = {"agreement": 1, "kl": 3, "cosine": 1}


@dataclass(frozen=True)
class Case:
    """A model and the task it is measured on."""

    name: str
    spec: str
    """Of the model: a folder in the shared one, or of this name in zoo/."""
    data: str
    test: str
    metric: str
    title: str
    budgets: tuple[float, ...] = (0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
    tokens: bool = False
    """Has tokens that can be merged."""
    heads: bool = True
    """Has heads."""

    def model(self, shared: Path) -> str | None:
        """The model as commands take it; None where it is absent."""
        if self.spec.startswith("demo:"):
            return self.spec
        places = shared / self.spec, Path(__file__).parent / "zoo" / Path(self.spec).name
        return next((str(place) for place in places if place.is_dir()), None)


@dataclass(frozen=True)
class Method:
    """How a model is pruned."""

    name: str
    title: str
    scoring: dict[str, Any] = field(default_factory=dict)
    request: dict[str, Any] = field(default_factory=dict)
    compensation: str = "none"
    producers: bool = False
    """Refits the producers, too: nobody else does."""
    steps: int = 1
    tokens: bool = False
    """Merges tokens: for models that can."""


class Cells:
    """What was measured of a model, `method/budget/seed` -> cell; its JSON file is rewritten after every cell."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / f"{name}.json"
        self.found: dict[str, dict[str, Any]] = self._read()

    def _read(self) -> dict[str, dict[str, Any]]:
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def put(self, key: str, cell: dict[str, Any]) -> None:
        self.found = self._read() | {key: cell}  # another run may have added cells meanwhile
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.path) as temporary:
            temporary.write_text(json.dumps(self.found, indent=1, sort_keys=True) + "\n")

    def of(self, method: Method, budget: float) -> list[dict[str, Any]]:
        cells = (self.found.get(f"{method.name}/{budget}/{seed}") for seed in SEEDS)
        return [cell for cell in cells if cell is not None]

    def series(self, method: Method, budget: float, metric: str) -> list[float]:
        return [cell["metrics"][metric] for cell in self.of(method, budget)]


def parser_of(description: str | None, name: str, *, shared: bool = True) -> argparse.ArgumentParser:
    """The options that all scripts have which keep their cells in benchmarks/`name`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if shared:
        parser.add_argument(
            "--shared", type=Path, default=Path("../shared"), help="the folder of data and models"
        )
    parser.add_argument("--cells", type=Path, default=Path(__file__).parent / name, help="keep cells here")
    parser.add_argument(
        "--report", action="store_true", help="measure nothing: the tables of the cells there are"
    )
    return parser


def report(folder: Path, cases: Sequence[Case], methods: Sequence[Method]) -> None:
    """A Markdown table and a plot for each model: the metric, and how near the outputs stay to the dense ones."""
    for case in cases:
        cells = Cells(folder, case.name)
        if not cells.found:
            continue
        measured = {float(key.split("/")[1]) for key in cells.found}
        case = replace(case, budgets=tuple(b for b in case.budgets if b in measured))
        any_cell = next(iter(cells.found.values()))
        dense = any_cell["dense"][case.metric]
        print(f"### {case.title} (dense {dense:.2f})\n")
        print("| method | " + " | ".join(f"{b:g}" for b in case.budgets) + " | seeds | score + prune |")
        print("|---" * (len(case.budgets) + 3) + "|")
        shown = [method for method in methods if any(cells.of(method, b) for b in case.budgets)]
        for method in shown:
            print(row_of(cells, case, method, shown))
        print()
        for metric, title in FIDELITY.items():
            if metric in any_cell["metrics"]:
                print(f"{title}\n")
                print("| method | " + " | ".join(f"{b:g}" for b in case.budgets) + " |")
                print("|---" * (len(case.budgets) + 1) + "|")
                for method in shown:
                    means = (cells.series(method, b, metric) for b in case.budgets)
                    texts = (f"{np.mean(m):.{FIDELITY_DIGITS[metric]}f}" if m else "" for m in means)
                    print(f"| {method.title} | " + " | ".join(texts) + " |")
                print()
        plot(cells, case, shown, dense, folder / f"{case.name}.png")


def row_of(cells: Cells, case: Case, method: Method, methods: Sequence[Method]) -> str:
    """Mean and deviation of a method at each budget; the best mean of a column is bold."""
    texts, metric = [], case.metric
    for budget in case.budgets:
        found = cells.series(method, budget, metric)
        best = max(
            (float(np.mean(s)) for m in methods if (s := cells.series(m, budget, metric))), default=0.0
        )
        text = f"{np.mean(found):.2f}" if found else ""
        text = f"**{text}**" if found and np.mean(found) >= best - 1e-9 else text
        texts.append(text + (f" ± {np.std(found, ddof=1):.2f}" if len(found) > 1 else ""))
    measured = [cells.of(method, budget) for budget in case.budgets]
    counts = {len(found) for found in measured if found}
    spent = [sum(cell["seconds"].values()) for found in measured for cell in found]
    seeds = "-".join(map(str, sorted({min(counts), max(counts)}))) if counts else "0"
    time_text = f"{np.median(spent):.0f} s" if spent else ""
    return f"| {method.title} | " + " | ".join(texts) + f" | {seeds} | {time_text} |"


def plot(cells: Cells, case: Case, methods: Sequence[Method], dense: float, path: Path) -> None:
    """The metric against the MACs kept, one line a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    axes.axhline(dense, color="0.6", linewidth=1)
    axes.annotate(
        "dense",
        (min(case.budgets), dense),
        textcoords="offset points",
        xytext=(0, 4),
        ha="right",
        color="0.4",
    )
    for number, method in enumerate(methods):
        points = [(b, np.mean(s)) for b in case.budgets if (s := cells.series(method, b, case.metric))]
        if points:
            # ten colours come again as dashes
            line = {"color": f"C{number % 10}", "ls": "--" if number >= 10 else "-", "lw": 1.2}
            if method.name == "ours":
                line = {"color": "black", "lw": 2.5, "zorder": 3}
            axes.plot(*zip(*points, strict=True), marker="o", ms=4, label=method.title, **line)
    axes.invert_xaxis()
    axes.set(xlabel="share of the MACs kept", ylabel=case.metric, title=case.title)
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
