"""The README's picture: quality against MACs, drawn from the cells that accuracy.py measured.

python benchmarks/tradeoff.py [--output docs/tradeoff.png]
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
PANELS = (
    ("minilm-stsb", "spearman", "MiniLM-L6, STS-B\nSpearman, points"),
    ("vit-cifar10", "top1", "small ViT, CIFAR-10\ntop-1, %"),
    ("resnet-cifar10", "top1", "small ResNet, CIFAR-10\ntop-1, %"),
)
BUDGETS = (0.7, 0.6, 0.5, 0.4, 0.3)
METHODS = (
    ("ours", "optin, defaults", {"color": "#0b5fa5", "lw": 2.4, "marker": "o", "ms": 5}),
    ("k-prune", "K-prune's method", {"color": "#4f8a3c", "lw": 1.3, "marker": "s", "ms": 4}),
    ("optin", "OPTIN, the paper", {"color": "#c2571a", "lw": 1.3, "marker": "^", "ms": 4.5}),
    ("magnitude", "magnitude", {"color": "0.6", "lw": 1.3, "marker": "x", "ms": 4.5}),
)


def series(cells: dict, method: str, metric: str) -> dict[float, float]:
    """Budget -> mean of the metric over seeds, of the budgets that were measured."""
    found = defaultdict(list)
    for key, cell in cells.items():
        name, budget, _ = key.split("/")
        if name == method and float(budget) in BUDGETS:
            found[float(budget)].append(cell["metrics"][metric])
    return {budget: float(np.mean(found[budget])) for budget in sorted(found, reverse=True)}


def draw(output: Path) -> None:
    """Draw one panel a model, budgets from left to right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(10, 3.2), layout="constrained")
    for axis, (name, metric, title) in zip(axes, PANELS, strict=True):
        cells = json.loads((HERE / "accuracy" / f"{name}.json").read_text())
        dense = next(iter(cells.values()))["dense"][metric]
        axis.axhline(dense, color="0.35", lw=1, ls=":")
        axis.annotate(
            "dense", (BUDGETS[-1], dense), xytext=(0, 3), textcoords="offset points", ha="right", fontsize=8
        )
        for method, label, line in METHODS:
            if points := series(cells, method, metric):
                axis.plot(list(points), list(points.values()), label=label, **line)
        axis.invert_xaxis()
        axis.set_xticks(BUDGETS)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("share of the MACs kept", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(axis="y", color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(METHODS),
        frameon=False,
        fontsize=9,
    )
    figure.savefig(output, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=HERE.parent / "docs" / "tradeoff.png")
    draw(parser.parse_args().output)
