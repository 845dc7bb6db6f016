"""`make demo-vision DATA=FOLDER`: prune the zoo's CIFAR-10 ViT with the real commands and show what it still sees.

FOLDER holds CIFAR-10 (or a data set of the same ten classes): anything that --data takes, with the splits train and
test. Ends in one table and a picture of test images with the classes that the dense and the pruned model see.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from demo import line, optin

from optin_cli import console
from optin_cli.data.batches import Batches
from optin_cli.data.examples import sample
from optin_cli.data.images import decode
from optin_cli.data.sources import DataSpec
from optin_cli.loading.checkpoint import open_model

MODEL = Path(__file__).parent / "zoo" / "vit-cifar10"
FOLDER = Path("demo")
BUDGETS = ("0.5",)
COLUMNS, ROWS = 8, 5


def picture(dense: str, pruned: str, data: str, path: Path, title: str) -> None:
    """A grid of test images under the classes that both models see; red where the pruned one is wrong."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = [open_model(spec) for spec in (dense, pruned)]
    examples = sample(DataSpec(data, "test"), "image", COLUMNS * ROWS, 0)
    image, label = examples.columns.image, examples.columns.label
    assert image is not None and label is not None, "the data has no image or no label column"
    names = examples.rows.features[label].names
    truth = examples.rows[label][:]
    batches = Batches(examples, models[0].processor, COLUMNS * ROWS)
    with torch.inference_mode():
        seen = [
            torch.cat([model.output(batch.inputs)[:, 0] for batch in batches]).argmax(-1).tolist()
            for model in models
        ]
    figure, axes = pyplot.subplots(ROWS, COLUMNS, figsize=(1.35 * COLUMNS, 1.75 * ROWS), layout="constrained")
    for axis, picture_, true, one, other in zip(
        axes.flat, examples.rows[image][:], truth, *seen, strict=True
    ):
        axis.imshow(decode(picture_))
        axis.set_axis_off()
        colour = "black" if other == true else "tab:red"
        axis.set_title(f"dense: {names[one]}\npruned: {names[other]}", fontsize=8, color=colour)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="CIFAR-10: a folder with train and test, or a hub id")
    data = parser.parse_args().data
    started = time.monotonic()
    FOLDER.mkdir(exist_ok=True)
    model, ranking = str(MODEL), str(FOLDER / "vit.h5")
    # curvature alone: exact heads would take minutes more and keep the same units here, near enough
    optin("score", model, "--data", data, "-o", ranking, "--samples", "256")
    rows = []
    for budget in BUDGETS:
        name = f"vit-{budget.replace('0.', '')}0"
        mask, pruned = str(FOLDER / f"{name}.mask.json"), str(FOLDER / name)
        optin("select", ranking, "--flops", budget, "-o", mask)
        optin("apply", model, mask, "-o", pruned, "--samples", "1024")
        quality = optin(
            "eval", pruned, "--baseline", model, "--data", data, "--split", "test", "--samples", "2000"
        )
        timings = optin("bench", pruned, "--baseline", model, "--batch-size", "32")
        dense, smaller = timings["timings"]
        if not rows:
            accuracy = f"{quality['baseline_metrics']['top1']:.1f}"
            rows.append([*line("dense", dense), "", accuracy, "100.0"])
        accuracy, same = quality["metrics"]["top1"], quality["fidelity"]["agreement"]
        rows.append([*line(budget, smaller), f"{smaller['speedup']:.2f}x", f"{accuracy:.1f}", f"{same:.1f}"])
    grid = FOLDER / "vit.png"
    picture(
        model,
        pruned,
        data,
        grid,
        f"CIFAR-10 test images, ViT pruned to {BUDGETS[-1]} of its MACs (red: it is wrong)",
    )
    columns = ["budget", "MACs", "params", "disk", "latency, batch 32", "speed-up", "top-1 %", "same class %"]
    console.note("")
    seconds = console.duration(time.monotonic() - started)
    console.table(f"CIFAR-10 ViT, pruned without retraining ({seconds} in all)", columns, rows)
    console.note(f"\ntop-1 and agreement on 2,000 test images. {grid} shows {COLUMNS * ROWS} of them.")


if __name__ == "__main__":
    main()
