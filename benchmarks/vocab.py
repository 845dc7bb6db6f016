"""What a smaller vocabulary saves and costs: on the text that it was counted on, and on other text.

    python benchmarks/vocab.py [--shared ../shared] [--cells benchmarks/vocab]                  # all-MiniLM-L6-v2
    python benchmarks/vocab.py --gemma MODEL [--rows 24]                                       # a causal language model
    python benchmarks/vocab.py --missing                            # tokens of test splits that train splits lack
    python benchmarks/vocab.py --report                             # tables from the cells that are there

MiniLM's tokens are counted on stsb's train split. It is measured on stsb's test split and, as other text, on 500
paragraphs of the Brown corpus: the cosine with the dense model, which reads the same texts by its own tokenizer (texts
are cut to 128 tokens). The decoder's tokens are counted on Brown's train.txt and the model measured on `--rows`
paragraphs of test.txt. There the nats of whole paragraphs are divided by the tokens of the whole vocabulary, for a text
that is split into more tokens has easier ones.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import math
import platform
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from cells import Case, Cells, parser_of

import optin_cli as optin
from optin_cli.data.opening import open_batches
from optin_cli.data.sources import DataSpec
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.tasks import metrics

SETTINGS: dict[str, dict[str, Any]] = {
    "coverage 1": {},
    "coverage 0.9999": {"coverage": 0.9999},
    "coverage 0.999": {"coverage": 0.999},
    "coverage 0.99": {"coverage": 0.99},
    "keep 120000": {"keep": 120_000},
    "keep 16000": {"keep": 16000},
    "keep 8000": {"keep": 8000},
    "keep 4000": {"keep": 4000},
}
ROWS = 500
"""Paragraphs of Brown that embeddings are compared on."""
BOTH = "coverage 1 of stsb and Brown"
"""Counted on the train text of Brown, too."""
PRUNED = "coverage 1, then 0.5 of the MACs"
MINILM = Case("minilm", "demo:minilm", "data/stsb", "test", "spearman", "all-MiniLM-L6-v2")
GEMMA = Case("gemma", "", "data/brown", "test", "perplexity", "Gemma 3 270M")


def minilm(options: argparse.Namespace) -> None:
    """Every setting, and one model that is pruned afterwards."""
    cells, shared = Cells(options.cells, MINILM.name), options.shared.resolve()
    stsb, brown = str(shared / "data/stsb"), str(shared / "data/brown/test.txt")
    dense = optin.open_model(MINILM.spec)

    texts = ((stsb, "test", None), (brown, "train", ROWS))
    theirs = [_vectors(dense, *data)[0] for data in texts]

    def measured(model: OpenModel, folder: Path | None) -> dict[str, Any]:
        (inside, labels), (outside, _) = (_vectors(model, *data) for data in texts)
        alike = torch.nn.functional.cosine_similarity(inside[0::2], inside[1::2])
        return {
            **_sizes(model, folder),
            **metrics.correlation(alike.numpy(), labels, stsb),
            "cosine": metrics.mean_cosine(inside, theirs[0]),
            "brown": metrics.mean_cosine(outside, theirs[1]),
            "longer": _longer(model, dense, Path(brown).read_text().splitlines()),
        }

    if "whole" not in cells.found:
        assert dense.source.folder is not None
        cells.put("whole", measured(dense, dense.source.folder))
    for name, settings in {**SETTINGS, BOTH: {}}.items():
        if settings.get("keep", 0) > cells.found["whole"]["tokens"]:
            continue
        if name in cells.found and (PRUNED in cells.found or name != "coverage 1"):
            continue
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "small"
            data = _joined(shared, Path(temporary) / "both.txt") if name == BOTH else stsb
            small = optin.vocab(dense, data, output=folder, **settings)
            found = measured(small, folder)
            cells.put(name, {**found, "covered": small.report.covered, "deviation": small.report.deviation})
            print(name, cells.found[name], flush=True)
            if name == "coverage 1":
                pruned = optin.prune(small, stsb, flops=0.5, output=Path(temporary) / "pruned")
                cells.put(PRUNED, measured(pruned, Path(temporary) / "pruned"))


def missing(options: argparse.Namespace) -> None:
    """The share of MiniLM's tokens in one text that another has not, beside what the command estimates."""
    shared = options.shared.resolve()
    tokenizer = optin.open_model(MINILM.spec).processor.tokenizer

    def counts(lines: list[str]) -> Counter[int]:
        return Counter(one for ids in tokenizer(lines, add_special_tokens=False)["input_ids"] for one in ids)

    stsb, brown = (
        {one: counts(_lines(shared, data, one)) for one in ("train", "test")} for data in ("stsb", "brown")
    )
    pairs = {
        "stsb test, counted on stsb": (stsb["train"], stsb["test"]),
        "stsb test, counted on both": (stsb["train"] + brown["train"], stsb["test"]),
        "Brown test, counted on Brown": (brown["train"], brown["test"]),
        "Brown test, counted on stsb": (stsb["train"], brown["test"]),
    }
    for name, (counted, other) in pairs.items():
        estimate = sum(count == 1 for count in counted.values()) / counted.total()
        share = sum(count for token, count in other.items() if token not in counted) / other.total()
        print(f"{name}: {100 * share:.2f} % are missing, estimated {100 * estimate:.2f} %")


def _lines(shared: Path, data: str, split: str) -> list[str]:
    """The texts of a split, one by one."""
    if data == "brown":
        return (shared / f"data/brown/{split}.txt").read_text().splitlines()
    with (shared / f"data/stsb/{split}.csv").open(newline="") as stream:
        return [row[column] for row in csv.DictReader(stream) for column in ("sentence1", "sentence2")]


def _joined(shared: Path, path: Path) -> str:
    """The texts of both train splits, a line each."""
    lines = [*_lines(shared, "stsb", "train"), *_lines(shared, "brown", "train")]
    path.write_text("".join(f"{' '.join(line.split())}\n" for line in lines))
    return str(path)


def gemma(options: argparse.Namespace) -> None:
    """The same of a decoder. One model is in memory at a time beside the whole one."""
    cells, brown = Cells(options.cells, GEMMA.name), options.shared.resolve() / "data/brown"
    lines = (brown / "test.txt").read_text().splitlines()
    texts = [lines[place * len(lines) // options.rows] for place in range(options.rows)]
    dense = optin.open_model(str(options.gemma))
    counted = _nats(dense, texts)[1]
    if "whole" not in cells.found:
        cells.put("whole", {**_sizes(dense, options.gemma), **_perplexity(dense, texts, counted)})
    for name in options.settings.split(","):
        if name in cells.found:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "small"
            small = optin.vocab(dense, str(brown / "train.txt"), output=folder, **SETTINGS[name])
            facts = {"covered": small.report.covered, "deviation": small.report.deviation}
            cells.put(name, {**_sizes(small, folder), **_perplexity(small, texts, counted), **facts})
            print(name, cells.found[name], flush=True)


@torch.inference_mode()
def _vectors(model: OpenModel, data: str, split: str, samples: int | None) -> tuple[torch.Tensor, Any]:
    """(embeddings of texts in their order, labels)"""
    batches = open_batches(DataSpec(data, split), model, samples, 32, seed=0, max_length=128)
    vectors = torch.zeros(batches.count, model.module.config.hidden_size)
    for batch in batches:
        vectors[batch.example_ids] = model.output(batch.inputs)[:, 0]
    return vectors, batches.labels()


@torch.inference_mode()
def _nats(model: OpenModel, texts: Sequence[str]) -> tuple[float, int]:
    """(negative log likelihood of texts, tokens that are predicted), each text alone."""
    nats, tokens = 0.0, 0
    for text in texts:
        ids = torch.tensor(model.processor.tokenizer(text)["input_ids"])[None, :512]
        logits = model.module(input_ids=ids).logits[0, :-1].float()
        nats += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        tokens += ids.shape[1] - 1
    return nats, tokens


def _perplexity(model: OpenModel, texts: Sequence[str], counted: int) -> dict[str, Any]:
    nats, tokens = _nats(model, texts)
    return {"perplexity": math.exp(nats / counted), "longer": tokens / counted, "rows": len(texts)}


def _longer(model: OpenModel, dense: OpenModel, lines: Sequence[str]) -> float:
    """Tokens of texts, as a multiple of those that the whole vocabulary splits them into."""
    ours, theirs = (
        sum(map(len, one.processor.tokenizer(list(lines), truncation=False)["input_ids"]))
        for one in (model, dense)
    )
    return ours / theirs


def _sizes(model: OpenModel, folder: Path | None) -> dict[str, Any]:
    where = {
        "date": datetime.date.today().isoformat(),
        "machine": platform.machine(),
        "torch": torch.__version__,
    }
    return {
        "tokens": model.module.get_input_embeddings().weight.shape[0],
        "params": sum(p.numel() for p in model.module.parameters()),
        "disk": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder else None,
        **where,
    }


def report(options: argparse.Namespace) -> None:
    """Markdown tables."""
    for case, columns in (
        (MINILM, {"spearman": 2, "cosine": 2, "brown": 2, "longer": 3}),
        (GEMMA, {"perplexity": 2, "longer": 3}),
    ):
        cells = Cells(options.cells, case.name).found
        if not cells:
            continue
        print(f"\n{case.title}\n\n| | tokens | parameters | disk | covered | {' | '.join(columns)} |")
        print(f"|---|{'---|' * (4 + len(columns))}")
        for name in (one for one in ("whole", *SETTINGS, BOTH, PRUNED) if one in cells):
            cell = cells[name]
            covered = f"{100 * cell['covered']:.2f} %" if "covered" in cell else ""
            numbers = " | ".join(f"{cell[column]:.{digits}f}" for column, digits in columns.items())
            print(
                f"| {name} | {cell['tokens']:,} | {cell['params'] / 1e6:.1f} M | {cell['disk'] / 2**20:.1f} MiB | "
                f"{covered} | {numbers} |"
            )


def main() -> None:
    parser = parser_of(__doc__, "vocab")
    parser.add_argument("--gemma", type=Path, help="directory of a causal language model")
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--settings", default="coverage 1,coverage 0.99,keep 120000")
    parser.add_argument("--missing", action="store_true")
    options = parser.parse_args()
    if options.report:
        report(options)
    elif options.missing:
        missing(options)
    elif options.gemma:
        gemma(options)
    else:
        minilm(options)


if __name__ == "__main__":
    main()
