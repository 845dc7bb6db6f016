"""mIoU against MACs of a pruned segmentation model: OPTIN as in the paper against what optin does by default.

    python benchmarks/segmentation.py --model benchmarks/zoo/mask2former-camvid --data CAMVID --output FOLDER

Both score the same images. OPTIN: the sum over the deeper blocks (`--feature-weights sum`), nothing refitted ("paper").
optin: its defaults, with compensation. Prints a table, and writes it as JSON with the MACs of each stream; a picture
shows test images with their masks, and what the dense and the pruned models see. What is there already is not made
again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from optin_cli import console
from optin_cli.compensation.plan import make_plan as make_refit
from optin_cli.compensation.settings import Compensation
from optin_cli.data.batches import Batches
from optin_cli.data.examples import sample
from optin_cli.data.images import decode
from optin_cli.data.label_maps import VOID, Masks
from optin_cli.data.sources import DataSpec
from optin_cli.execution.macs import count_macs, observed_tokens
from optin_cli.loading.checkpoint import OpenModel, open_model
from optin_cli.measure.evaluate import Evaluation, evaluate
from optin_cli.pruning import apply as applying
from optin_cli.scoring import score as scoring
from optin_cli.scoring.plan import ScoreSettings, make_plan
from optin_cli.selection.select import select
from optin_cli.selection.settings import Request
from optin_cli.tasks.segmentation import map_size, upsampled

WAYS = {
    "paper": {"feature_weights": "sum", "compensate": "none"},
    "optin": {"feature_weights": None, "compensate": "auto"},
}
"""How a mask is selected and applied; both from one ranking."""
COLOURS = np.array(
    [
        (128, 180, 230), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (90, 128, 0), (192, 128, 128),
        (64, 64, 128), (64, 0, 128), (200, 80, 0), (0, 128, 192), (20, 20, 20),
    ],
    dtype=np.uint8,
)  # fmt: skip
"""Of CamVid's classes; the last one is void."""
SHOWN = 4


def shares(model: OpenModel) -> dict[str, float]:
    """MACs of one image, in millions: of the prunable parts of each stream, by the first module of its path; of all."""
    inputs = {"pixel_values": torch.zeros(1, 3, *model.module.config.image_size)}
    batch = {key: value.to(model.device, model.dtype) for key, value in inputs.items()}
    tokens, total = observed_tokens(model, batch), count_macs(model, batch)
    found: dict[str, float] = {}
    for site in model.anatomy:
        parts = model.anatomy.blocks[site.block].split(".")
        name = ".".join(part for part in parts[1:3] if not part.isdigit())
        found[name] = found.get(name, 0) + site.macs(tokens, site.units) / 1e6
    return {**{name: round(value, 2) for name, value in found.items()}, "all": round(total / 1e6, 2)}


def measured(model: OpenModel, dense: OpenModel, data: DataSpec, samples: int | None) -> Evaluation:
    """On the images of a split."""
    examples = sample(data, "image", samples, 0, reader=model.task.reader)
    return evaluate(model, Batches(examples, model.processor, 8, reader=model.task.reader), dense)


def picture(models: dict[str, OpenModel], data: DataSpec, path: Path) -> None:
    """Test images with the mask and with what each model sees laid over them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dense = next(iter(models.values()))
    examples = sample(data, "image", SHOWN, 0, reader=dense.task.reader)
    masks = Masks(examples, dense.task.classes, False)
    seen: dict[str, list[Any]] = {"mask": list(masks)}
    for name, model in models.items():
        (batch,) = Batches(examples, model.processor, SHOWN, reader=model.task.reader)
        with torch.inference_mode():
            output = model.output(batch.inputs)
        size = map_size(output.shape[1], batch.inputs["pixel_values"].shape[-2:])
        seen[name] = [upsampled(o, size, m.shape).numpy() for o, m in zip(output, masks, strict=True)]
    columns = ["image", *seen]
    figure, axes = pyplot.subplots(
        SHOWN, len(columns), figsize=(3 * len(columns), 2.3 * SHOWN), layout="constrained", squeeze=False
    )
    for row, stored in enumerate(examples.rows[examples.columns.image]):
        image = np.asarray(decode(stored))
        for axis, column in zip(axes[row], columns, strict=True):
            axis.set_axis_off()
            if column == "image":
                axis.imshow(image)
            else:
                ids = seen[column][row]
                colours = COLOURS[np.where(ids == VOID, len(COLOURS) - 1, ids % (len(COLOURS) - 1))]
                axis.imshow((0.35 * image + 0.65 * colours).astype(np.uint8))
            if row == 0:
                axis.set_title(column, fontsize=10)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="CamVid, or other images with masks")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for rankings, models and the report"
    )
    parser.add_argument(
        "--budgets", default="0.9,0.8,0.7,0.6", help="shares of the prunable MACs that are kept"
    )
    parser.add_argument("--split", default="train", help="to score and refit on")
    parser.add_argument("--test", default="test")
    parser.add_argument("--method", default="curvature", help="how both score: curvature, ablation or mixed")
    parser.add_argument("--samples", type=int, default=64, help="images that are scored on")
    parser.add_argument("--refit", type=int, default=128, help="images that are refitted on")
    parser.add_argument("--tested", type=int, default=None, help="test images (default: all)")
    parser.add_argument("--ignore-index", type=int, default=11)
    told = parser.parse_args()
    told.output.mkdir(parents=True, exist_ok=True)
    data = DataSpec(told.data, told.split, ignore_index=told.ignore_index)
    test = dataclasses.replace(data, split=told.test)

    dense = open_model(told.model, dtype="float32")
    plan = make_plan(
        open_model(told.model, dtype="float32"),
        data,
        ScoreSettings(method=told.method, samples=told.samples, batch_size=8),
    )
    file = told.output / f"{told.method}-{told.samples}.h5"
    ranking = scoring.existing(file, plan)
    if ranking is None:
        with console.progress(True) as on_progress:
            ranking = scoring.score(plan, file, on_progress)
    first = measured(dense, dense, test, told.tested)
    results: list[dict[str, Any]] = [{"way": "dense", "budget": 1.0, **report(dense, first)}]
    last: dict[str, OpenModel] = {"dense": dense}
    for budget in map(float, told.budgets.split(",")):
        for way, how in WAYS.items():
            request = Request(flops=budget, feature_weights=how["feature_weights"])
            mask = select(ranking, request)
            folder = told.output / f"{way}-{told.method}-{100 * budget:.0f}"
            if not folder.is_dir():
                settings = Compensation(method=how["compensate"], samples=told.refit, batch_size=8)
                model = open_model(told.model, dtype="float32")
                refit = make_refit(model, mask, settings, at_most=True)
                applying.apply(model, mask, folder, plan=refit)
            pruned = open_model(str(folder))
            results.append(
                {"way": way, "budget": budget, **report(pruned, measured(pruned, dense, test, told.tested))}
            )
            last[f"{way} at {budget:g}"] = pruned
            (told.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    show(results)
    shown = dict([*list(last.items())[:1], *list(last.items())[-len(WAYS) :]])
    picture(shown, test, told.output / "segmentation.png")


def report(model: OpenModel, found: Evaluation) -> dict[str, Any]:
    """One line of the results."""
    return {"macs": shares(model), **found.metrics, **found.fidelity}


def show(results: list[dict[str, Any]]) -> None:
    """The table."""
    streams = list(results[0]["macs"])
    columns = [
        "budget",
        "way",
        "mIoU",
        "pixels %",
        "agreement %",
        "KL",
        *(f"M MACs: {name}" for name in streams),
    ]
    rows = [
        [
            f"{line['budget']:g}", line["way"], f"{line['miou']:.2f}", f"{line['pixel_accuracy']:.2f}",
            f"{line['agreement']:.2f}", f"{line['kl']:.4f}", *(f"{line['macs'][name]:.1f}" for name in streams),
        ]
        for line in results
    ]  # fmt: skip
    console.table("segmentation, pruned without training", columns, rows)


if __name__ == "__main__":
    main()
