"""Whole heads against heads at lower ranks: the same model, data, MACs and seeds, with the default compensation.

    python benchmarks/ranks.py [--shared ../shared] [--models vit,stsb,sst2,mpnet] [--budgets 0.3,0.2] [--seeds 0]
                               [--split test] [--rows 2500] [--samples 512] [--refit 2048] [--latency]
    python benchmarks/ranks.py --shapes MODEL [--length 64] [--batches 1,32]    # ms of heads alone, ranks alone

`--split` says what is measured on: `train` where a default is to be chosen, since calibration draws few of its rows.
A line of JSON a cell: metrics, the distance to the dense model, how many heads of which rank each block keeps, and
with `--latency` the median milliseconds of one forward at batch 1 and 32, whole and cut models in turns.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from optin_cli.architectures.resolve import dissect
from optin_cli.compensation.plan import make_plan as plan_compensation
from optin_cli.compensation.settings import Compensation
from optin_cli.data.batches import Batches
from optin_cli.data.examples import sample
from optin_cli.data.sources import DataSpec
from optin_cli.loading.checkpoint import OpenModel, open_model
from optin_cli.loading.from_module import copy_of
from optin_cli.measure.evaluate import evaluate
from optin_cli.measure.latency import bench, ideal_speedup
from optin_cli.pipeline import score
from optin_cli.pruning.apply import PrunedModel, prune_model
from optin_cli.scoring.plan import make_plan
from optin_cli.scoring.settings import ScoreSettings
from optin_cli.selection.select import select
from optin_cli.selection.settings import Request
from optin_cli.transforms.slicing import slice_model

HERE = Path(__file__).parent
MODELS = {
    "vit": (str(HERE / "zoo/vit-cifar10"), "data/cifar10"),
    "stsb": ("demo:minilm", "data/stsb"),
    "sst2": ("models/minilm-l6-sst2", "data/sst2"),
    "mpnet": ("models/all-mpnet-base-v2", "data/stsb"),
}
VARIANTS = {"whole heads": False, "ranks": True}


def opened(name: str, shared: Path) -> tuple[OpenModel, DataSpec]:
    spec, data = MODELS[name]
    return open_model(str(shared / spec) if spec.startswith("models/") else spec), DataSpec(
        str(shared / data)
    )


def held(model: OpenModel, data: DataSpec, split: str, rows: int | None) -> Batches:
    """The rows to measure on: with another seed than calibration draws by."""
    found = sample(replace(data, split=split), model.family.modality, rows, 12345, reader=model.task.reader)
    return Batches(found, model.processor, 64, reader=model.task.reader)


def shapes(model: PrunedModel) -> str:
    """`6x8 6x12 ..`: heads times rank of every block."""
    return " ".join(f"{s.units}x{s.width}" if s.units else "0" for s in model.anatomy if s.kind == "heads")


def milliseconds(
    models: dict[str, OpenModel], batches: Batches, size: int, turns: int = 30
) -> dict[str, float]:
    """Median time of a forward of each model, one after the other in every turn."""
    first = next(iter(batches)).head(size)
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for turn in range(turns + 3):
            for name, model in models.items():
                inputs = first.to(model.device, model.dtype).inputs
                started = time.perf_counter()
                model.output(inputs)
                if turn >= 3:
                    times[name].append(1000 * (time.perf_counter() - started))
    return {name: round(statistics.median(found), 2) for name, found in times.items()}


def cut_shapes(model: OpenModel) -> list[OpenModel]:
    """The model, and copies whose attention alone is cut: to some of its heads, and to all of them at as many
    dimensions; at ranks in fours, eights and sixteens."""
    sites = [site for site in model.anatomy if site.kind == "heads"]
    units, width = sites[0].units, sites[0].width
    whole = [(heads, width) for heads in range(units - 1, 0, -1) if heads * width % (4 * units) == 0]
    lower = [(units, heads * width // units) for heads, _ in whole]
    odd = [(units, rank) for rank in range(width // 2 + 4, min(width, width // 2 + 16), 4)]
    found = [model]
    for heads, rank in dict.fromkeys((*whole, *lower, *odd)):
        module = copy.deepcopy(model.module)
        anatomy = model.anatomy.cut({site.name: rank for site in sites if rank < width})
        slice_model(module, anatomy, {site.name: range(heads) for site in sites})
        source = replace(model.source, spec=f"{heads} x {rank}")
        found.append(replace(model, module=module, anatomy=dissect(module, model.family), source=source))
    return found


def time_shapes(spec: str, length: int, batches: Sequence[int], repeats: int) -> None:
    """A table of milliseconds, shapes in turns; in brackets the part of the ideal speed-up that is reached."""
    several = cut_shapes(open_model(spec))
    print(f"\n{spec}, {length} tokens\n\n| heads x rank | MACs |" + "".join(f" batch {b} |" for b in batches))
    print("|---" * (2 + len(batches)) + "|")
    columns = []
    for batch in batches:
        ms = [timing.median_ms for timing in bench(several, [batch], [length], repeats=repeats, seconds=20.0)]
        ideal = [ideal_speedup(several[0], model, length) for model in several]
        columns.append(
            [f"{t:.2f} ({100 * ms[0] / t / best:.0f} %)" for t, best in zip(ms, ideal, strict=True)]
        )
    for index, model in enumerate(several):
        name = model.spec if index else "dense"
        macs = 1 / ideal_speedup(several[0], model, length)
        print(f"| {name} | {macs:.3f} | " + " | ".join(column[index] for column in columns) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--models", default="vit,stsb,sst2")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--budgets", default="0.3,0.2")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--split", default="")
    parser.add_argument("--rows", type=int, default=2500)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--refit", type=int, default=2048)
    parser.add_argument("--latency", action="store_true")
    parser.add_argument("--shapes", help="time attention alone, cut to some heads and ranks, of this model")
    parser.add_argument("--length", type=int, default=64, help="of --shapes: tokens")
    parser.add_argument("--batches", default="1,32", help="of --shapes")
    parser.add_argument("--repeats", type=int, default=20, help="of --shapes: calls of each, at least")
    options = parser.parse_args()
    if options.shapes:
        batches = [int(size) for size in options.batches.split(",")]
        time_shapes(options.shapes, options.length, batches, options.repeats)
        return
    for name in options.models.split(","):
        for seed in map(int, options.seeds.split(",")):
            for cell in cells(name, seed, options):
                print(json.dumps(cell), flush=True)


def cells(name: str, seed: int, options: argparse.Namespace) -> Any:
    model, data = opened(name, options.shared.resolve())
    split = options.split or ("validation" if name == "sst2" else "test")
    batches = held(model, data, split, options.rows)
    variants = options.variants.split(",")
    rankings = {}
    for variant in variants:
        settings = ScoreSettings(seed=seed, samples=options.samples, ranks=VARIANTS[variant])
        plan = make_plan(model, data, settings)
        started = time.perf_counter()
        rankings[variant] = score(plan), time.perf_counter() - started
    for budget in map(float, options.budgets.split(",")):
        pruned: dict[str, OpenModel] = {"dense": model}
        for variant in variants:
            ranking, scoring = rankings[variant]
            mask = select(ranking, Request(flops=budget, ranks=VARIANTS[variant]))
            settings = Compensation(seed=seed, samples=options.refit)
            started = time.perf_counter()
            plan = plan_compensation(model, mask, settings, data, at_most=True)
            small = prune_model(copy_of(model), mask, plan=plan)
            refitting = time.perf_counter() - started
            found = evaluate(small, batches, model)
            pruned[variant] = small
            yield {
                "model": name, "budget": budget, "variant": variant, "seed": seed, "split": split,
                **{k: round(v, 4) for k, v in {**found.metrics, **found.fidelity}.items()},
                "dense": {k: round(v, 2) for k, v in found.baseline_metrics.items()},
                "heads": shapes(small), "neurons": [s.units for s in small.anatomy if s.kind == "neurons"],
                "gap": round(mask.objective["gap"], 6), "deviation": small.report.deviation,
                "seconds": {"score": round(scoring, 1), "prune": round(refitting, 1)},
            }  # fmt: skip
        if options.latency:
            for size in (1, 32):
                found = milliseconds(pruned, batches, size)
                yield {"model": name, "budget": budget, "seed": seed, "batch": size, "milliseconds": found}


if __name__ == "__main__":
    sys.exit(main())
