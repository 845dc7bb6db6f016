"""The numbers of the main job, on real models and data. Prints Markdown for benchmarks/RESULTS.md.

    python benchmarks/main_job.py [--shared ../shared] [--only accuracy,output_term,speed,agreement,exactness,latency]

Everything runs through the functions that the commands call; nothing is read from an earlier run.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from optin_cli.architectures.resolve import dissect, family_of
from optin_cli.artefacts.ranking import Ranking
from optin_cli.data.batches import Batches
from optin_cli.data.examples import sample
from optin_cli.data.sources import DataSpec
from optin_cli.execution.macs import MacCounter
from optin_cli.loading.checkpoint import OpenModel, open_model
from optin_cli.measure.evaluate import Evaluation, evaluate
from optin_cli.measure.latency import bench, ideal_speedup, speedup
from optin_cli.pruning.apply import apply
from optin_cli.scoring.plan import ScoreSettings, make_plan
from optin_cli.scoring.score import score
from optin_cli.selection.select import select
from optin_cli.selection.settings import Request
from optin_cli.structure.anatomy import Anatomy
from optin_cli.transforms.masking import masked, masks_from_keep
from optin_cli.transforms.slicing import slice_model

SEEDS = (0, 1, 2)
MINILM = "demo:minilm"


def table(columns: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def rank(model: OpenModel, data: DataSpec, settings: ScoreSettings, folder: Path) -> Ranking:
    return score(make_plan(model, data, settings), folder / f"{time.monotonic_ns()}.h5")


def test_batches(model: OpenModel, data: DataSpec) -> Batches:
    return Batches(
        sample(data, "text", None, 0, reader=model.task.reader), model.processor, 64, reader=model.task.reader
    )


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.2f} ({', '.join(f'{v:.2f}' for v in values)})"


def accuracy(shared: Path, folder: Path) -> None:
    """Numbers 1 and 2: quality without compensation, three calibration seeds."""
    cases = (
        ("all-MiniLM-L6-v2", MINILM, shared / "data/stsb", "test", "spearman"),
        (
            "minilm-l6-sst2",
            str(shared / "models/minilm-l6-sst2"),
            shared / "data/sst2",
            "validation",
            "accuracy",
        ),
    )
    rows = []
    for name, spec, data, split, metric in cases:
        found: dict[float, list[Evaluation]] = {0.6: [], 0.5: []}
        seconds = []
        for seed in SEEDS:
            model = open_model(spec)
            ranking = rank(model, DataSpec(str(data)), ScoreSettings(seed=seed), folder)
            seconds.append(ranking.seconds)
            for budget in found:
                out = folder / f"{name}-{budget}-{seed}"
                apply(open_model(spec), select(ranking, budget), out)
                batches = test_batches(model, DataSpec(str(data), split))
                found[budget].append(evaluate(open_model(str(out)), batches, model))
        dense = found[0.6][0].baseline_metrics[metric]
        rows.append([name, metric, "1.0", f"{dense:.2f}", "", ""])
        for budget, results in found.items():
            close = "cosine" if "cosine" in results[0].fidelity else "agreement"
            rows.append(
                [
                    name,
                    metric,
                    f"{budget}",
                    spread([r.metrics[metric] for r in results]),
                    f"{close} {np.mean([r.fidelity[close] for r in results]):.2f}",
                    f"{np.mean(seconds):.0f} s",
                ]
            )
    table(["model", "metric", "budget", "mean (seeds 0, 1, 2)", "fidelity", "scoring"], rows)


def output_term(shared: Path, folder: Path) -> None:
    """What lambda, the weight of the output term, does: one ranking a seed, recombined at selection."""
    data = shared / "data/stsb"
    rankings = [
        rank(open_model(MINILM), DataSpec(str(data)), ScoreSettings(seed=s), folder) for s in SEEDS[:2]
    ]
    dense = open_model(MINILM)
    batches = test_batches(dense, DataSpec(str(data), "test"))
    rows = []
    for weight in (0.0, 0.3, 0.6, 1.0, 3.0):
        row = [f"{weight:g}"]
        for budget in (0.6, 0.5):
            found = []
            for seed, ranking in enumerate(rankings):
                out = folder / f"{weight}-{budget}-{seed}"
                mask = select(ranking, Request(flops=budget, output_weight=weight))
                apply(open_model(MINILM), mask, out)
                found.append(evaluate(open_model(str(out)), batches, dense))
            row.append(spread([f.metrics["spearman"] for f in found]))
            row.append(f"{np.mean([f.fidelity['cosine'] for f in found]):.1f}")
        rows.append(row)
    table(["lambda", "Spearman at 0.6", "cosine", "Spearman at 0.5", "cosine"], rows)


def speed(shared: Path, folder: Path) -> None:
    """Number 3, first half: curvature of all units on 512 sentences with 4 probes a batch."""
    settings = ScoreSettings(method="curvature", probes=4)
    data = DataSpec(str(shared / "data/stsb"))
    rank(open_model(MINILM), data, ScoreSettings(method="curvature", samples=64), folder)  # warm up
    seconds = [rank(open_model(MINILM), data, settings, folder).seconds for _ in range(3)]
    table(["curvature, 9,288 units, 512 sentences, 4 probes a batch"], [[f"{spread(seconds)} s, three runs"]])


def agreement(shared: Path, folder: Path) -> None:
    """Number 3, second half: rank agreement of curvature with ablation on the same 32 sentences."""
    model, data = open_model(MINILM), DataSpec(str(shared / "data/stsb"))

    def scored(method: str, probes: int) -> Ranking:
        settings = ScoreSettings(method=method, probes=probes, samples=32, batch_size=32, sketch_rows=0)
        return rank(model, data, settings, folder)

    exact = scored("ablation", 1)
    print(f"ablation of all 9,288 units on 32 sentences: {exact.seconds:.0f} s\n")
    rows = []
    for probes in (8, 32, 128, 512):
        found = scored("curvature", probes)
        for kind in ("neurons", "heads"):
            pairs = [(f, e) for f, e in zip(found.sites, exact.sites, strict=True) if f.kind == kind]
            trajectory = [(f.trajectory.sum(1), e.trajectory.sum(1)) for f, e in pairs]
            ours, theirs = (np.concatenate(side) for side in zip(*trajectory, strict=True))
            output = [np.concatenate([pair[i].output for pair in pairs]) for i in (0, 1)]
            rows.append(
                [
                    str(probes),
                    kind,
                    f"{spearmanr(ours, theirs)[0]:.3f}",
                    " ".join(f"{spearmanr(*pair)[0]:.2f}" for pair in trajectory),
                    f"{spearmanr(*output)[0]:.3f}",
                    f"{np.median(ours / theirs):.2f}",
                    f"{found.seconds:.1f} s",
                ]
            )
    table(
        ["probes", "units", "trajectory, overall", "by block", "output", "median ratio", "time, all units"],
        rows,
    )


def wide_models() -> Iterator[tuple[str, torch.nn.Module, dict[str, torch.Tensor], int]]:
    """(family, random model of real width but few blocks, inputs, tokens) of every family."""
    import timm
    import transformers

    ids = torch.randint(10, 900, (4, 48), generator=torch.Generator().manual_seed(0))
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    names = {
        "bert": "Bert",
        "roberta": "Roberta",
        "xlm-roberta": "XLMRoberta",
        "electra": "Electra",
        "mpnet": "MPNet",
    }
    for name, prefix in names.items():
        config = getattr(transformers, f"{prefix}Config")(
            num_hidden_layers=3, hidden_size=768, num_attention_heads=12, intermediate_size=3072
        )
        yield name, getattr(transformers, f"{prefix}ForSequenceClassification")(config), text, 48
    config = transformers.DistilBertConfig(n_layers=3)
    yield "distilbert", transformers.DistilBertForSequenceClassification(config), text, 48
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    for name, prefix, tokens in (("vit", "ViT", 197), ("deit", "DeiT", 198)):
        config = getattr(transformers, f"{prefix}Config")(num_hidden_layers=3)
        made = getattr(transformers, f"{prefix}ForImageClassification")(config)
        yield name, made, {"pixel_values": pixels}, tokens
    yield "timm-vit", timm.create_model("vit_small_patch16_224", depth=3), {"x": pixels}, 197


def block_macs(model: torch.nn.Module, anatomy: Anatomy, inputs: dict[str, torch.Tensor]) -> float:
    """MACs of one example inside the blocks, counted while they run."""
    inside = 0
    with torch.no_grad(), MacCounter() as counter, ExitStack() as hooks:

        def enter(*_: object) -> None:
            nonlocal inside
            inside -= counter.total

        def leave(*_: object) -> None:
            nonlocal inside
            inside += counter.total

        for path in anatomy.blocks:
            block = model.get_submodule(path)
            hooks.callback(block.register_forward_pre_hook(enter).remove)
            hooks.callback(block.register_forward_hook(leave).remove)
        model(**inputs)
    return inside / next(iter(inputs.values())).shape[0]


def exactness(shared: Path, folder: Path) -> None:
    """Numbers 4 and 6: sliced against masked, counted MACs against the table's, every family at real width."""
    rows = []
    for name, model, inputs, tokens in wide_models():
        model.eval().requires_grad_(False)
        anatomy = dissect(model, family_of(model))
        rng = np.random.default_rng(0)
        keep = {
            s.name: sorted(rng.choice(s.units, rng.integers(0, s.units + 1), replace=False).tolist())
            for s in anatomy
        }
        sliced = copy.deepcopy(model)
        slice_model(sliced, anatomy, keep)
        with torch.no_grad():
            with masked(model, anatomy, masks_from_keep(anatomy, keep)):
                expected = model(**inputs)
            found = sliced(**inputs)
        expected, found = (getattr(o, "logits", o) for o in (expected, found))
        errors = []
        for module in (model, sliced):
            read = dissect(module, family_of(module))
            counted = block_macs(module, read, inputs)
            errors.append(f"{100 * (read.macs(tokens) / counted - 1):+.3f} %")
        rows.append([name, f"{float((expected - found).abs().max()):.1e}", *errors])
    table(["family", "sliced - masked, largest", "MACs against torch, dense", "sliced"], rows)


def latency(shared: Path, folder: Path) -> None:
    """Number 5: measured speed-up of the 0.5 model at batch 32 as a share of the ideal."""
    data = DataSpec(str(shared / "data/stsb"))
    dense = open_model(MINILM)
    mask = select(rank(dense, data, ScoreSettings(method="curvature"), folder), 0.5)
    apply(open_model(MINILM), mask, folder / "half")
    half = open_model(str(folder / "half"))
    rows = []
    for length in (16, 64, 128):
        slow, fast = bench([dense, half], [32], [length], seconds=15)
        ideal = ideal_speedup(dense, half, length)
        gained = speedup(slow, fast)
        rows.append(
            [
                f"32 x {length}",
                f"{slow.median_ms:.1f} ({slow.p10_ms:.1f}..{slow.p90_ms:.1f}) ms",
                f"{fast.median_ms:.1f} ({fast.p10_ms:.1f}..{fast.p90_ms:.1f}) ms",
                f"{gained:.2f}x",
                f"{ideal:.2f}x",
                f"{gained / ideal:.2f}",
            ]
        )
    table(["batch x tokens", "dense", "0.5", "speed-up", "ideal", "share of the ideal"], rows)


PARTS = {f.__name__: f for f in (accuracy, output_term, speed, agreement, exactness, latency)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--shared", type=Path, default=Path("../shared"), help="folder with data/ and models/"
    )
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated parts")
    options = parser.parse_args()
    print(
        f"{datetime.date.today()}, {platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}\n"
    )
    for name in options.only.split(","):
        print(f"### {name}: {(PARTS[name].__doc__ or '').strip()}\n", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            PARTS[name](options.shared, Path(folder))


if __name__ == "__main__":
    main()
