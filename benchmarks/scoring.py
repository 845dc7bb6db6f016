"""Scoring speed: naive against the engines, side by side in one run. Prints Markdown for benchmarks/RESULTS.md.

    python benchmarks/scoring.py [--shared ../shared] [--only minilm,bert,memory,growth,team] [--device cpu]

Everything runs through the functions that the commands call. The naive time is one full padded forward a unit
with the losses of its features, as the papers' code does it, on some random units.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import processes
import torch
from scipy.stats import spearmanr

from optin_cli.artefacts.ranking import Ranking, read_ranking
from optin_cli.data.sources import DataSpec
from optin_cli.execution.hooks import block_outputs
from optin_cli.loading.checkpoint import OpenModel, open_model
from optin_cli.scoring.calibration import gather_rows, measured_blocks
from optin_cli.scoring.losses import output_change, relational_change
from optin_cli.scoring.methods.ablation import Ablation
from optin_cli.scoring.methods.curvature import curvature
from optin_cli.scoring.plan import Plan, ScoreSettings, make_plan
from optin_cli.scoring.score import score
from optin_cli.selection.select import select
from optin_cli.selection.settings import Request
from optin_cli.transforms.masking import masked

MINILM = "demo:minilm"
SENTENCES = 32
ONE_BATCH = ScoreSettings(samples=SENTENCES, batch_size=SENTENCES, sketch_rows=0)


def table(columns: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds:.0f} s"


class Naive:
    """One full padded forward a unit, and the losses of the deeper blocks' features and of the output."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.model = plan, plan.model
        self.batch = plan.calibration.batch(0)
        self.features, self.output = self._forward({})
        tokens = self.features[0].shape[1]
        (self.rows,) = plan.calibration.sampled_rows(0, [self.batch], [tokens])
        self.dense = {z: gather_rows(f, self.rows) for z, f in self.features.items()}
        self.weights = self.model.task.row_weights(self.batch.inputs)

    @torch.inference_mode()
    def _forward(self, masks: dict[str, torch.Tensor]) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
        features: dict[int, torch.Tensor] = {}
        with block_outputs(self.model, features), masked(self.model.module, self.model.anatomy, masks):
            output = self.model.output(self.batch.inputs)
        return features, output

    @torch.inference_mode()
    def score(self, name: str, unit: int) -> tuple[float, float]:
        site = self.model.anatomy[name]
        mask = torch.ones(site.units, device=self.model.device)
        mask[unit] = 0
        features, output = self._forward({name: mask})
        trajectory = sum(
            float(relational_change(self.dense[z], gather_rows(features[z], self.rows)[None]))
            for z in measured_blocks(site, len(self.model.anatomy.blocks))
        )
        change = output_change(
            self.output,
            output[None],
            self.weights,
            temperature=self.plan.settings.temperature,
            term=self.model.task.term,
        )
        return trajectory, float(change / self.weights.sum())


def some_units(plan: Plan, count: int) -> list[tuple[str, int]]:
    rng = np.random.default_rng(0)
    everything = [(site.name, unit) for site in plan.model.anatomy for unit in range(site.units)]
    return [everything[i] for i in rng.choice(len(everything), count, replace=False)]


def units_of(plan: Plan) -> int:
    return sum(site.units for site in plan.model.anatomy)


def minilm(shared: Path, folder: Path, device: str) -> None:
    """Naive, ablation and curvature on one batch of sentences: time and agreement."""
    spec, data = open_model(MINILM, device=device), DataSpec(str(shared / "data/stsb"))
    plan = make_plan(spec, data, ONE_BATCH)
    naive = Naive(plan)
    chosen = some_units(plan, 100)
    naive.score(*chosen[0])
    expected: list[tuple[float, float]] = []
    each = timed(lambda: expected.extend(naive.score(*unit) for unit in chosen)) / len(chosen)
    naive_seconds = each * units_of(plan)
    shape = tuple(naive.batch.inputs["input_ids"].shape)
    print(
        f"One batch of {shape[0]} sentences padded to {shape[1]}, {len(naive.rows)} real tokens; "
        f"{units_of(plan):,} units.\n"
    )
    rows = [["naive, from 100 units", duration(naive_seconds), "1x", "", "", "", ""]]
    exact: Ranking | None = None
    for name, method, precision, probes in (
        ("ablation", "ablation", "full", 1),
        ("ablation, reduced", "ablation", "reduced", 1),
        *((f"curvature, {n} probe{'s' * (n > 1)}", "curvature", "full", n) for n in (1, 2, 4, 8, 32, 128)),
    ):
        settings = ScoreSettings(
            method=method,
            precision=precision,
            probes=probes,
            samples=SENTENCES,
            batch_size=SENTENCES,
            sketch_rows=0,
        )
        found = score(make_plan(spec, data, settings), folder / f"{name}.h5")
        row = [name, duration(found.seconds), f"{naive_seconds / found.seconds:.1f}x"]
        if exact is None:
            exact = found
        if method == "ablation":
            row += [
                errors(found, chosen, expected),
                "",
                "",
                overlap(found, exact) if found is not exact else "",
            ]
        else:
            row += [
                "",
                agreement(found, exact, "neurons"),
                agreement(found, exact, "heads"),
                overlap(found, exact),
            ]
        rows.append(row)
    columns = ["engine", "time", "against naive", "error against naive (median, largest)"]
    columns += ["neurons: Spearman to exact", "heads", "same units kept at 0.6, 0.5"]
    table(columns, rows)


def errors(found: Ranking, chosen: list[tuple[str, int]], expected: list[tuple[float, float]]) -> str:
    sites = {site.name: site for site in found.sites}
    pairs = [(sites[name].trajectory[unit].sum(), sites[name].output[unit]) for name, unit in chosen]
    relative = np.abs(np.array(pairs) / np.array(expected) - 1)
    return f"{np.median(relative):.1e}, {relative.max():.1e}"


def agreement(found: Ranking, exact: Ranking, kind: str) -> str:
    pairs = [(a.score, b.score) for a, b in zip(found.sites, exact.sites, strict=True) if a.kind == kind]
    return f"{spearmanr(*(np.concatenate(part) for part in zip(*pairs, strict=True)))[0]:.3f}"


def overlap(found: Ranking, exact: Ranking) -> str:
    shares = []
    for budget in (0.6, 0.5):
        one, two = (select(ranking, Request(flops=budget)).keep for ranking in (found, exact))
        same = sum(len(set(one[name]) & set(two[name])) for name in one)
        shares.append(f"{100 * same / sum(map(len, two.values())):.1f} %")
    return ", ".join(shares)


def random_bert(folder: Path, layers: int, hidden: int, heads: int = 12, device: str = "cpu") -> OpenModel:
    """A randomly initialised BERT with MiniLM's tokenizer."""
    import transformers

    source = open_model(MINILM).source.folder
    assert source is not None
    config = transformers.BertConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
    )
    torch.manual_seed(0)
    path = folder / f"bert-{layers}-{hidden}"
    transformers.BertModel(config).save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(path)
    return open_model(str(path), device=device)


def bert(shared: Path, folder: Path, device: str) -> None:
    """BERT-base, timing only: naive and ablation from some units, curvature whole."""
    model = random_bert(folder, 12, 768, device=device)
    plan = make_plan(model, DataSpec(str(shared / "data/stsb")), ONE_BATCH)
    naive = Naive(plan)
    chosen = some_units(plan, 20)
    naive.score(*chosen[0])
    seconds = timed(lambda: [naive.score(*unit) for unit in chosen]) / len(chosen) * units_of(plan)
    rows = [["naive, from 20 units", duration(seconds), "1x"]]
    for name, reduced in (("ablation", False), ("ablation, reduced", True)):
        ablation = Ablation(plan.calibration, 0, reduced)
        total = 0.0
        for site in model.anatomy:
            units = np.arange(min(site.units, 2 * ablation.step))
            ablation.score(site, units[: ablation.step])
            total += timed(lambda a=ablation, s=site, u=units: a.score(s, u)) / len(units) * site.units
        rows.append([f"{name}, from some units of each site", duration(total), f"{seconds / total:.1f}x"])
    sites = list(model.anatomy)
    for probes in (1, 8):
        spent = timed(lambda n=probes: curvature(plan.calibration, 0, sites, range(n)))
        rows.append(
            [f"curvature, {probes} probe{'s' * (probes > 1)}", duration(spent), f"{seconds / spent:.0f}x"]
        )
    print(f"Randomly initialised BERT-base, {units_of(plan):,} units, the same {SENTENCES} sentences.\n")
    table(["engine", "time", "against naive"], rows)


def memory(shared: Path, folder: Path, device: str) -> None:
    """Peak memory of a scoring process, less that of one that only opens the model and the data."""
    rows = []
    for name, options in (
        ("nothing scored", ["--dry-run", "--method", "magnitude"]),
        ("heads by ablation, neurons by curvature", ["--method", "mixed"]),
        ("the same, --memory 200MiB", ["--method", "mixed", "--memory", "200MiB"]),
        ("curvature, 2 probes", ["--method", "curvature"]),
        ("curvature, 2 probes, --memory 200MiB", ["--method", "curvature", "--memory", "200MiB"]),
    ):
        output = folder / f"m-{len(rows)}.h5"
        command = [sys.executable, "-m", "optin_cli", "score", MINILM, "--data", shared / "data/stsb"]
        command += ["--samples", SENTENCES, "-o", output, "-q", "--device", device]
        spent = processes.run([*command, *options])
        rows.append([name, f"{spent.peak:.0f} MiB"])
    table([f"{SENTENCES} sentences", "peak resident memory of the process"], rows)


def growth(shared: Path, folder: Path, device: str) -> None:
    """How time grows with samples, units and depth: three points each and the exponent between the ends."""
    data = DataSpec(str(shared / "data/stsb"))
    rows = []

    def exponent(name: str, sizes: list[int], seconds: list[float]) -> None:
        slope = np.polyfit(np.log(sizes), np.log(seconds), 1)[0]
        points = ", ".join(f"{size}: {duration(s)}" for size, s in zip(sizes, seconds, strict=True))
        rows.append([name, points, f"{slope:.2f}"])

    def probe(model: OpenModel, samples: int) -> float:
        plan = make_plan(model, data, ScoreSettings(method="curvature", samples=samples, sketch_rows=0))
        return score(plan, folder / f"{time.monotonic_ns()}.h5").seconds

    def ablate(model: OpenModel, count: int | None) -> float:
        ablation = Ablation(make_plan(model, data, ONE_BATCH).calibration, 0)
        sites = list(model.anatomy)
        ablation.score(sites[0], np.arange(ablation.step))
        return timed(lambda: [ablation.score(s, np.arange(s.units)[: count or 96]) for s in sites])

    small = open_model(MINILM, device=device)
    exponent("curvature, samples", [128, 256, 512], [probe(small, n) for n in (128, 256, 512)])
    exponent("ablation, units of each site", [24, 48, 96], [ablate(small, n) for n in (24, 48, 96)])
    models = [random_bert(folder, layers, 384, device=device) for layers in (3, 6, 12)]
    exponent("curvature, blocks (units grow too)", [3, 6, 12], [probe(m, 128) for m in models])
    exponent("ablation, blocks (the same units a site)", [3, 6, 12], [ablate(m, 48) for m in models])
    table(["time against", "points", "exponent"], rows)


def team(shared: Path, folder: Path, device: str) -> None:
    """One process with one thread, and two of them under torchrun: time, and whether the file is the same."""
    rows = []
    for method, samples in (("ablation", 8), ("curvature", 256)):
        found = []
        for count in (1, 2):
            output = folder / f"team-{method}-{count}.h5"
            launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "-m"]
            command = [*launch, "optin_cli", "score", MINILM, "--data", str(shared / "data/stsb"), "-q"]
            command += ["--method", method, "--samples", str(samples), "-o", str(output)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
            found.append(read_ranking(output))
        one, two = found
        same = all(
            np.array_equal(a.score, b.score) and np.array_equal(a.trajectory, b.trajectory)
            for a, b in zip(one.sites, two.sites, strict=True)
        )
        rows.append(
            [
                f"{method}, {samples} sentences",
                duration(one.seconds),
                duration(two.seconds),
                f"{one.seconds / two.seconds:.2f}x",
                "bit-identical" if same else "not identical",
            ]
        )
    table(["", "one process, one thread", "two processes", "speed-up", "scores"], rows)


PARTS = {"minilm": minilm, "bert": bert, "memory": memory, "growth": growth, "team": team}


def chosen_parts(only: str) -> Iterator[tuple[str, Callable[[Path, Path, str], None]]]:
    names = only.split(",") if only else list(PARTS)
    unknown = set(names) - set(PARTS)
    if unknown:
        sys.exit(f"no part {', '.join(sorted(unknown))}; there is {', '.join(PARTS)}")
    return ((name, PARTS[name]) for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--only", default="", help=f"parts: {','.join(PARTS)}")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    print(
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {where}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, part in chosen_parts(options.only):
            print(f"### {name}\n", flush=True)
            part(options.shared.resolve(), Path(folder), options.device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"Peak resident memory of this process: {peak:.0f} MiB")


if __name__ == "__main__":
    main()
