"""The commands that faults are injected into, with a tiny model, and what their outputs say."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from helpers import forks
from helpers.data import tiny_text_csv
from helpers.models import tiny_model

from optin_cli.artefacts.exported import FILE_NAME as EXPORT
from optin_cli.artefacts.exported import read_export
from optin_cli.artefacts.files import digest_json
from optin_cli.artefacts.latency import read_latency_table
from optin_cli.artefacts.mask import read_mask
from optin_cli.artefacts.point import read_sweep
from optin_cli.artefacts.pruned import check_weights, read_pruned
from optin_cli.artefacts.ranking import read_ranking

FAST = ["--samples", "12", "--batch-size", "6", "--probes", "1"]
PLAIN = ["--device", "cpu", "-q"]


@dataclass(frozen=True)
class Step:
    """One command, the output that it writes, and what that says whenever it was made."""

    name: str
    args: list[object]
    output: Path | None
    content: Callable[[Path], str] | None

    def said(self) -> str:
        """What the output says; raises where it is damaged. '' of a command without one."""
        return self.content(self.output) if self.output and self.content else ""

    def clear(self) -> None:
        """Remove the output, and whatever is beside it under a name made of its name."""
        if self.output is None:
            return
        for pattern in (f"{self.output.name}*", f".{self.output.name}*"):
            for path in self.output.parent.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def left(self) -> list[str]:
        """Temporary files beside the output."""
        if self.output is None or not self.output.parent.exists():
            return []
        return [
            path.name for path in self.output.parent.iterdir() if path.name.startswith(f".{self.output.name}")
        ]


def of_model(path: Path) -> str:
    check_weights(path)
    weights = hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
    return digest_json([read_pruned(path).kept, weights])


def of_sweep(path: Path) -> str:
    """Without the timings."""
    sweep = read_sweep(path)
    return digest_json([[point.name, point.mask, of_model(sweep.directory(point))] for point in sweep.points])


def of_table(path: Path) -> str:
    """Times are others at every run."""
    table = read_latency_table(path)
    return digest_json([table.model, table.setting, sorted(table.sites)])


def of_text(path: Path) -> str:
    return path.read_text()


def of_export(path: Path) -> str:
    """Whole archives; their bytes are others at every run."""
    record = read_export(path / EXPORT)
    for name in record.files:
        with ZipFile(path / name) as archive:
            assert archive.testzip() is None, name
    return digest_json([record.model["digest"], sorted(record.files)])


def of_page(path: Path) -> str:
    text = path.read_text()
    return "whole" if text.rstrip().endswith("</html>") else "cut"


def commands(folder: Path, **sizes: Any) -> list[Step]:
    """Every command, in an order in which each finds what it reads; outputs lie in folders of their own."""
    model, data = tiny_model("bert", folder / "model", **sizes), tiny_text_csv(folder / "data")
    work = folder / "work"
    ranking, mask, small, sweep = (work / n / n for n in ("r.h5", "m.json", "small", "sweep"))
    prune = [
        "prune",
        model,
        "--data",
        data,
        "--flops",
        0.5,
        "--ranking",
        ranking,
        "--compensate",
        "none",
        *FAST,
        *PLAIN,
    ]
    swept = ["sweep", model, "--data", data, "--flops", "0.7,0.5", "--ranking", ranking, "--compensate", "none",
             "--seconds", 0, "--repeats", 1, "--bench-batch-size", 1, *FAST, *PLAIN]  # fmt: skip
    timed = ["--repeats", 1, "--seconds", 0, "--batch-size", 1, "--seq-len", 8, *PLAIN]
    refit = ["--memory", "1KiB", "--samples", 24, "--batch-size", 6]  # spills its activations
    steps = [
        Step(
            "score",
            ["score", model, "--data", data, *FAST, *PLAIN],
            ranking,
            lambda p: read_ranking(p).digest,
        ),
        Step("select", ["select", ranking, "--flops", 0.6, "-q"], mask, lambda p: read_mask(p).digest),
        Step("apply", ["apply", model, mask, *refit, *PLAIN], small, of_model),
        Step("prune", prune, work / "p" / "p", of_model),
        Step("sweep", swept, sweep, of_sweep),
        Step("bench --table", ["bench", model, *timed], work / "t" / "t.json", of_table),
        Step("report", ["report", ranking, mask, "-q"], work / "page" / "page.html", of_page),
        Step("families --trace", ["families", "--trace", model, "-q"], work / "y" / "y.yaml", of_text),
        Step("export", ["export", small, "--to", "torch", "-q"], work / "e" / "e", of_export),
    ]
    flags = {"bench --table": "--table"}
    steps = [Step(s.name, [*s.args, flags.get(s.name, "-o"), s.output], s.output, s.content) for s in steps]
    return [
        *steps,
        Step("bench", ["bench", small, "--baseline", model, *timed], None, None),
        Step("eval", ["eval", small, "--baseline", model, "--data", data, *PLAIN], None, None),
        Step("pick", ["pick", sweep, "--max-drop", 100, "-q"], None, None),
        Step("inspect", ["inspect", ranking, "-q"], None, None),
        Step("rankings", ["rankings", "verify", ranking, "-q"], None, None),
        Step("config", ["config", "-q"], None, None),
    ]


def warmed(steps: list[Step]) -> None:
    """Run every command once in this process, so that what a fork costs is the work alone."""
    with quiet():
        for step in steps:
            code = forks.code_of(step.args)
            assert code == 0, f"{step.name} ends with {code}"


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing of this process reaches the terminal."""
    kept = [os.dup(1), os.dup(2)]
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        for number in (1, 2):
            os.dup2(null, number)
        yield
    finally:
        for number, stream in zip((1, 2), kept, strict=True):
            os.dup2(stream, number)
            os.close(stream)
        os.close(null)
