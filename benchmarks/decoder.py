"""Decoders: perplexity against MACs, the paper's OPTIN beside ours, and how fast they are. Prints Markdown.

    python benchmarks/decoder.py MODEL --data FOLDER [--budgets 0.9,0.8,0.7,0.6,0.5] [--samples 4096] [--rows 16384]

MODEL is a causal language model, such as what zoo/decoder.py makes; FOLDER has its text: train.txt to score and
compensate on, test.txt to measure on. `--test-rows` of the latter are read. Speed is the median of interleaved calls
on this machine: a forward of 128 tokens, and greedy generation with the cache.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

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
from optin_cli.selection.settings import Request

# name -> (settings of the score, request of the selection, compensation); OPTIN's features are summed, lambda is 1
METHODS = {
    "magnitude": ({"method": "magnitude"}, {}, "none"),
    "OPTIN, the paper": ({}, {"output_weight": 1.0, "feature_weights": "sum"}, "none"),
    "ours, not compensated": ({}, {}, "none"),
    "ours": ({}, {}, "auto"),
}
BATCH, LENGTH = 4, 128


def tokens(model: OpenModel, length: int) -> torch.Tensor:
    """A random text, (BATCH, length)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, model.task.classes, (BATCH, length), generator=generator).to(model.device)


@torch.inference_mode()
def generation(model: OpenModel) -> float:
    """Tokens a second of greedy generation with the cache, after a prompt of a quarter as many as there will be."""
    length = min(LENGTH, model.processor.max_length)
    ids = tokens(model, length // 4)
    count = length - length // 4
    start = time.perf_counter()
    model.module.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
        do_sample=False,
    )  # fmt: skip
    return BATCH * count / (time.perf_counter() - start)


@torch.inference_mode()
def forward(model: OpenModel) -> float:
    """Tokens a second of a forward."""
    ids = tokens(model, min(LENGTH, model.processor.max_length))
    start = time.perf_counter()
    model.run({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return ids.numel() / (time.perf_counter() - start)


def speeds(models: Sequence[OpenModel], rounds: int) -> list[tuple[float, float]]:
    """(generation, forward) of each model: medians of rounds in which each has its turn."""
    for model in models:
        forward(model)  # warm
    found = [[(generation(model), forward(model)) for model in models] for _ in range(rounds)]
    return [tuple(map(statistics.median, zip(*column, strict=True))) for column in zip(*found, strict=True)]


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="folder with train.txt and test.txt")
    parser.add_argument("--budgets", default="0.9,0.8,0.7,0.6,0.5")
    parser.add_argument("--samples", type=int, default=4096, help="lines that are scored on")
    parser.add_argument("--rows", type=int, default=16384, help="lines that are compensated on")
    parser.add_argument("--test-rows", type=int, help="lines that are measured on; default all")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help="of timing; 0 times nothing")
    args = parser.parse_args()
    train, test = DataSpec(args.data, "train"), DataSpec(args.data, "test")
    lengths = {"max_length": args.max_length, "batch_size": args.batch_size}
    dense = open_model(args.model, device="cpu")
    examples = sample(test, "text", args.test_rows, 0, reader=dense.task.reader, at_most=True)
    tested = Batches(examples, dense.processor, reader=dense.task.reader, **lengths)
    found = evaluate(dense, tested)
    print(f"dense: perplexity {found.metrics['perplexity']:.2f}, accuracy {found.metrics['accuracy']:.1f}\n")
    print(
        "| MACs kept | method | perplexity | rise | accuracy | agreement | KL |\n|---|---|---|---|---|---|---|"
    )
    budgets = [float(budget) for budget in args.budgets.split(",")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kept: dict[float, OpenModel] = {}
        for budget in budgets:
            for number, (method, (scored, request, compensation)) in enumerate(METHODS.items()):
                model = open_model(args.model, device="cpu")
                settings = ScoreSettings(samples=args.samples, **lengths, **scored)
                plan = scoring_plan(model, train, settings)
                path = (
                    folder / f"{scored.get('method', 'curvature')}.h5"
                )  # one ranking serves all that need it
                ranking = scoring.existing(path, plan, any_lambda=True) if path.exists() else None
                mask = select(ranking or scoring.score(plan, path), Request(flops=budget, **request))
                wanted = make_plan(
                    model, mask, Compensation(compensation, args.rows, **lengths), train, at_most=True
                )
                surgery.apply(model, mask, folder / f"{number}-{budget}", plan=wanted)
                pruned = open_model(str(folder / f"{number}-{budget}"), device="cpu")
                row(budget, method, pruned, tested, dense)
                kept[budget] = pruned  # the last method's
        if args.rounds:
            print("\n| MACs kept | generation, tokens/s | forward, tokens/s |\n|---|---|---|")
            told = zip(["1.0", *budgets], speeds([dense, *kept.values()], args.rounds), strict=True)
            for budget, (generated, passed) in told:
                print(f"| {budget} | {generated:.0f} | {passed:.0f} |", flush=True)


def row(budget: float, method: str, pruned: OpenModel, tested: Batches, dense: OpenModel) -> None:
    """Print one row of the table."""
    told = evaluate(pruned, tested, dense)
    ours, like = told.metrics, told.fidelity
    cells = f"{ours['perplexity']:.2f} | {told.drop:+.1f} % | {ours['accuracy']:.1f}"
    print(f"| {budget} | {method} | {cells} | {like['agreement']:.1f} | {like['kl']:.3f} |", flush=True)


if __name__ == "__main__":
    main()
