"""Perplexity of a causal language model against the MACs of its blocks: ours, baselines, allocations, calibrations.

    python benchmarks/perplexity.py MODEL --data FOLDER [--only dense,ours,flap] [--budgets 0.9,0.8,0.7,0.6,0.5]
    python benchmarks/perplexity.py MODEL --data FOLDER --calibrate docs        # or both; brown by default
    python benchmarks/perplexity.py MODEL --report                              # tables from the cells that are there

FOLDER has train.txt and test.txt, a paragraph a line (the Brown corpus). Perplexity is of windows of 512 tokens. Every
cell is kept as soon as it is measured (`--cells`): a run that is stopped goes on where it was. `--score-rows`,
`--refit-rows` and `--test-rows` make it as short as the machine needs; the cells say what they were measured with.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cells import Case, Cells, Method, parser_of
from decoder import speeds

from optin_cli.artefacts.mask import Mask
from optin_cli.artefacts.ranking import Ranking
from optin_cli.compensation.plan import make_plan as plan_compensation
from optin_cli.compensation.settings import Compensation
from optin_cli.data.batches import Batches
from optin_cli.data.docs import split_sentences
from optin_cli.data.examples import sample
from optin_cli.data.sources import DataSpec
from optin_cli.loading.checkpoint import open_model
from optin_cli.measure.evaluate import evaluate
from optin_cli.pruning.apply import prune_model
from optin_cli.scoring.plan import make_plan
from optin_cli.scoring.score import existing, score
from optin_cli.scoring.settings import ScoreSettings
from optin_cli.selection.select import select
from optin_cli.selection.settings import Request

BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5)
CALIBRATIONS = ("brown", "docs", "both")
_STRETCH = 16
"""Lines of the test text that stay together where not all are read."""
_EVEN, _GROWING = "even", "growing"

METHODS = (
    Method("dense", "dense"),
    Method("ours", "ours", {}, {}, "auto", producers=True),
    Method("flap", "FLAP", {"method": "flap"}),
    Method("wanda-sp", "Wanda-sp, layers alike", {"method": "wanda-sp"}, {"allocation": _EVEN}),
    Method("magnitude", "magnitude", {"method": "magnitude"}),
    Method("depth", "whole blocks (ShortGPT)", {"method": "depth"}),
    Method("ours-bare", "ours, not refitted"),
    Method("ours-consumers", "ours, --no-producers (GRAIL's refit)", {}, {}, "auto"),
    Method("ours-even", "ours, layers alike", {}, {"allocation": _EVEN}, "auto", producers=True),
    Method(
        "ours-growing", "ours, more from deeper layers", {}, {"allocation": _GROWING}, "auto", producers=True
    ),
    Method("wanda-sp-global", "Wanda-sp, all layers compared", {"method": "wanda-sp"}),
)


def shares(allocation: str, budget: float, depth: int) -> list[float]:
    """The share of each block that stays, whose mean is `budget`: `even`, or falling linearly with depth as far as
    shares of 0 to 1 allow."""
    if allocation == _EVEN:
        return [budget] * depth
    reach = min(budget, 1 - budget)
    return [budget + reach * (1 - 2 * block / max(1, depth - 1)) for block in range(depth)]


def allocated(ranking: Ranking, mask: Mask, allocation: str, budget: float) -> Mask:
    """The best units of each block within its share of the MACs: heads in proportion, neurons fill what is left."""
    depth = 1 + max(site.block for site in ranking.sites)
    keep = dict(mask.keep)
    for block, share in enumerate(shares(allocation, budget, depth)):
        sites = sorted((s for s in ranking.sites if s.block == block), key=lambda s: s.kind)  # heads first
        each = [site.macs_per_unit(ranking.tokens) for site in sites]
        left = share * sum(site.macs(ranking.tokens, site.units) for site in sites)
        for site, cost in zip(sites, each, strict=True):
            wanted = round(share * site.units) if site.kind == "heads" else site.units
            base = site.macs(ranking.tokens, 1) - cost  # keys and values that all heads share
            count = max(0, min(wanted, site.units, int((left - base) / cost + 1e-9)))
            keep[site.name] = sorted((-site.score).argsort(kind="stable")[:count].tolist())
            left -= site.macs(ranking.tokens, count)
    macs = sum(s.macs(ranking.tokens, len(keep[s.name])) for s in ranking.sites)
    reached = {**mask.reached, "flops": macs / ranking.dense_macs(ranking.tokens)}
    return replace(mask, keep=keep, reached=reached)  # type: ignore[arg-type]


class Runner:
    """Makes the cells of one model and one calibration."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work = options, work
        self.dense = open_model(options.model, device="cpu")
        test = stretches(Path(options.data) / "test.txt", options.test_rows, work / "test.txt")
        found = sample(DataSpec(str(test), "test"), "text", None, 0, reader=self.dense.task.reader)
        self.tested = Batches(
            found, self.dense.processor, 4, max_length=options.length, reader=self.dense.task.reader
        )
        self.calibration = calibration(options.calibrate, Path(options.data), work)

    def run(self, method: Method, budget: float) -> dict[str, Any]:
        """Prune and measure one cell."""
        seconds: dict[str, float] = {}
        pruned, reached, scored = self.dense, 1.0, 0
        if method.name != "dense":
            lengths = {"max_length": self.options.score_length, "batch_size": self.options.batch_size}
            model = open_model(self.options.model, device="cpu")
            settings = ScoreSettings(
                samples=self.options.score_rows,
                probes=self.options.probes,
                sketch_rows=0,
                **lengths,
                **method.scoring,
            )
            plan = make_plan(model, self.calibration, settings)
            scored = sum(plan.calibration.batches.tokens(i) for i in range(len(plan.calibration)))
            path = self.work / f"{self.options.calibrate}-{settings.method}.h5"
            ranking = existing(path, plan, any_lambda=True) or score(plan, path)
            seconds["score"] = ranking.seconds
            request = dict(method.request)
            allocation = request.pop("allocation", None)
            mask = select(ranking, Request(flops=budget, **request))
            if allocation:
                mask = allocated(ranking, mask, allocation, budget)
            compensation = Compensation(
                method.compensation, method.producers, samples=self.options.refit_rows,
                max_length=self.options.score_length, joined=self.options.joined,
            )  # fmt: skip
            started = time.perf_counter()
            again = plan_compensation(model, mask, compensation, self.calibration, at_most=True)
            pruned = prune_model(model, mask, plan=again)
            seconds["prune"] = time.perf_counter() - started
            reached = mask.reached["flops"]
        started = time.perf_counter()
        found = evaluate(pruned, self.tested)
        seconds["eval"] = time.perf_counter() - started
        rates = speeds([self.dense, pruned], self.options.rounds) if self.options.rounds else []
        return {
            "metrics": found.metrics,
            "reached": reached,
            "seconds": {name: round(value, 1) for name, value in seconds.items()},
            "tokens_per_second": [dict(zip(("generate", "forward"), rate, strict=True)) for rate in rates],
            "scored_tokens": scored,
            "refit_rows": self.options.refit_rows if method.compensation != "none" else 0,
            "test_tokens": sum(self.tested.tokens(i) for i in range(len(self.tested))),
            "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
            "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        }


def stretches(source: Path, rows: int | None, target: Path) -> Path:
    """A text of about `rows` lines in stretches from all over `source`; None for `source` itself."""
    if rows is None:
        return source
    lines = source.read_text().splitlines()
    count = max(1, rows // _STRETCH)
    starts = [i * len(lines) // count for i in range(count)]
    target.write_text("\n".join(line for start in starts for line in lines[start : start + _STRETCH]) + "\n")
    return target


def calibration(name: str, data: Path, work: Path) -> DataSpec:
    """What is scored and refitted on. `both` has a paragraph of docs behind each of the text."""
    if name == "brown":
        return DataSpec(str(data), "train")
    if name == "docs":
        return DataSpec("builtin:docs", "train")
    docs = split_sentences("train")
    paragraphs = [" ".join(docs[i : i + 5]) for i in range(0, len(docs), 5)]
    lines = (data / "train.txt").read_text().splitlines()
    folder = work / "both"
    folder.mkdir(exist_ok=True)
    pairs = zip(lines, paragraphs, strict=False)
    (folder / "train.txt").write_text("\n".join(line for pair in pairs for line in pair) + "\n")
    return DataSpec(str(folder), "train")


def case_of(options: argparse.Namespace, name: str) -> Case:
    """The cells of a model by what it was calibrated on."""
    model = Path(options.model).name
    return Case(
        f"{model}-{name}", options.model, "", "test", "perplexity", f"{model}, calibrated on {name}", BUDGETS
    )


def report(options: argparse.Namespace) -> None:
    """A table of perplexities for each calibration; lower is better."""
    for name in CALIBRATIONS:
        cells = Cells(options.cells, case_of(options, name).name)
        if not cells.found:
            continue
        budgets = sorted({float(key.split("/")[1]) for key in cells.found} - {1.0}, reverse=True)
        print(f"### {cells.path.stem}\n\n| method | " + " | ".join(f"{b:g}" for b in budgets) + " |")
        print("|---" * (len(budgets) + 1) + "|")
        if dense := cells.found.get("dense/1.0/0"):
            print(f"| dense: {dense['metrics']['perplexity']:.2f} |" + " |" * len(budgets))
        for method in METHODS[1:]:
            found = [cells.found.get(f"{method.name}/{budget}/0") for budget in budgets]
            if any(found):
                print(f"| {method.title} | " + " | ".join(_shown(cell) for cell in found) + " |")
        print()


def _shown(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    text = f"{cell['metrics']['perplexity']:.2f}"
    if rates := cell["tokens_per_second"]:
        text += f" ({rates[1]['forward'] / rates[0]['forward']:.2f}x)"
    return text


def wanted(options: argparse.Namespace) -> list[tuple[Method, float]]:
    """Budget by budget, so that a stopped run has whole columns."""
    names = options.only.split(",") if options.only else [method.name for method in METHODS]
    unknown = set(names) - {method.name for method in METHODS}
    if unknown:
        raise SystemExit(f"no {', '.join(sorted(unknown))}; there is {', '.join(m.name for m in METHODS)}")
    chosen: Sequence[Method] = [method for name in names for method in METHODS if method.name == name]
    budgets = [float(budget) for budget in options.budgets.split(",")]
    dense = [(method, 1.0) for method in chosen if method.name == "dense"]
    return dense + [(m, budget) for budget in budgets for m in chosen if m.name != "dense"]


def main() -> None:
    """Measure the cells that are missing, and print the tables."""
    parser = parser_of(__doc__, "perplexity", shared=False)
    parser.add_argument("model")
    parser.add_argument("--data", help="folder with train.txt and test.txt")
    parser.add_argument("--calibrate", choices=CALIBRATIONS, default="brown")
    parser.add_argument("--only", default="", help=f"methods: {','.join(m.name for m in METHODS)}")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--length", type=int, default=512, help="tokens of a window that is measured")
    parser.add_argument(
        "--score-length", type=int, default=128, help="and of one that is scored or refitted on"
    )
    parser.add_argument("--score-rows", type=int, default=800, help="lines to score on")
    parser.add_argument("--refit-rows", type=int, default=2048, help="lines to refit on")
    parser.add_argument("--joined", type=float, default=0.25, help="`Compensation.joined`")
    parser.add_argument("--test-rows", type=int, help="lines to measure on; default all")
    parser.add_argument("--probes", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=0, help="of timing; 0 times nothing")
    parser.add_argument("--work", type=Path, help="keep rankings here (default: a temporary folder)")
    options = parser.parse_args()
    if not options.report:
        with tempfile.TemporaryDirectory() as temporary:
            work = options.work or Path(temporary)
            work.mkdir(parents=True, exist_ok=True)
            runner, cells = None, Cells(options.cells, case_of(options, options.calibrate).name)
            for method, budget in wanted(options):
                key = f"{method.name}/{budget}/0"
                if key in cells.found:
                    continue
                runner = runner or Runner(options, work)
                cell = runner.run(method, budget)
                cells.put(key, cell)
                print(f"{key}: {cell['metrics']['perplexity']:.2f}  {cell['seconds']}", flush=True)
    report(options)


if __name__ == "__main__":
    main()
