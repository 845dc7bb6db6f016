"""Blocks that share a backward pass: how much time that saves, and what it costs in agreement.

    python benchmarks/strata.py MODEL [--data ../shared/data/brown] [--samples 128] [--max-length 128] [--threads 1]
                                [--strata own,1,2,3,4] [--probes 2] [--reference 16]

The reference has a pass for every block and many probes, whose seeds no other has. Agreement is Spearman's, over the
units of each kind, of the scores that `select` sees at a budget of 0.5; "kept alike" is the share of what a budget of
0.5 keeps that the reference keeps, too. Prints Markdown for benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import datetime
import tempfile
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from optin_cli.artefacts.latency import processor_name
from optin_cli.artefacts.ranking import Ranking
from optin_cli.data.sources import DataSpec
from optin_cli.importance import auto_weighting, combine
from optin_cli.loading.checkpoint import OpenModel, open_model
from optin_cli.scoring.calibration import Calibration
from optin_cli.scoring.plan import ScoreSettings, make_plan
from optin_cli.scoring.score import score
from optin_cli.selection.select import select
from optin_cli.selection.settings import Request

BUDGET = 0.5


class Apart(Calibration):
    """The same examples and rows, with other signs."""

    def generator(self, batch: int, stream: int = 0) -> torch.Generator:
        return super().generator(batch, stream and stream + 1_000)


def scored(
    model: OpenModel, given: argparse.Namespace, output: Path, *, apart: bool, **settings: int
) -> Ranking:
    asked = ScoreSettings(samples=given.samples, max_length=given.max_length, sketch_rows=0, **settings)
    plan = make_plan(model, DataSpec(str(given.data), split="train"), asked)
    if apart:
        seen = plan.calibration
        plan.calibration = Apart(seen.model, seen.batches, seen.rows, seen.temperature, seen.seed)
    return score(plan, output)


def scores(ranking: Ranking) -> dict[str, np.ndarray]:
    """Kind -> the scores of its units, as `select` puts them together."""
    weights, output_weight = auto_weighting(ranking.kinds, ranking.model["task"], BUDGET)
    found = combine(ranking.sites, output_weight, weights)
    kinds: dict[str, list[np.ndarray]] = {}
    for site in ranking.sites:
        kinds.setdefault(site.kind, []).append(found[site.name])
    return {kind: np.concatenate(parts) for kind, parts in kinds.items()}


def kept(ranking: Ranking) -> np.ndarray:
    mask = select(ranking, Request(flops=BUDGET))
    return np.concatenate([np.isin(np.arange(site.units), mask.keep[site.name]) for site in ranking.sites])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/brown"))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--max-length", type=int, help="tokens of a text, by default all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--strata", default="own,1,2,3,4")
    parser.add_argument("--probes", type=int, default=2)
    parser.add_argument("--reference", type=int, default=16, help="probes of the reference")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.set_flush_denormal(True)
    model = open_model(given.model, device="cpu")
    depth = len(model.anatomy.blocks)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "reference.h5"
        reference = scored(model, given, output, apart=True, strata=depth, probes=given.reference)
        best, chosen = scores(reference), kept(reference)
        print(
            f"{given.model}, {depth} blocks, {given.samples} texts, {given.probes} probes, "
            f"{datetime.date.today()}, {processor_name()}, {given.threads} threads\n"
        )
        kinds = list(best)
        print(
            "| strata | seconds | " + " | ".join(f"agreement, {kind}" for kind in kinds) + " | kept alike |"
        )
        print("|---" * (3 + len(kinds)) + "|")
        for name in given.strata.split(","):
            count = depth if name == "own" else int(name)
            output = Path(folder) / f"{name}.h5"
            found = scored(model, given, output, apart=False, strata=count, probes=given.probes)
            agreement = [spearmanr(best[kind], scores(found)[kind])[0] for kind in kinds]
            alike = (chosen & kept(found)).sum() / chosen.sum()
            cells = " | ".join(f"{value:.3f}" for value in agreement)
            print(f"| {name} | {found.seconds:.1f} | {cells} | {alike:.3f} |", flush=True)


if __name__ == "__main__":
    main()
