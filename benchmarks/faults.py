"""Faults, injected and counted: damaged files by kind, and signals at random moments of score, select and apply.

    python benchmarks/faults.py --damaged 4000 --signals 40

Prints one Markdown table for docs/reliability.md. Every run draws its faults anew; `--seed` repeats one. A damaged file
has to be read as it was or refused with one of optin's errors, within the time limit. After a signal there is never a
damaged file under a final name, and a rerun gives what an undisturbed run gave.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from helpers.artefacts import latency_table, tiny_ranking
from helpers.data import tiny_text_csv
from helpers.models import tiny_model

from optin_cli.architectures.families import family_to_yaml, find_family, read_family
from optin_cli.artefacts.files import digest_json
from optin_cli.artefacts.latency import read_latency_table, write_latency_table
from optin_cli.artefacts.mask import read_mask, write_mask
from optin_cli.artefacts.pruned import FILE_NAME, check_weights, read_pruned
from optin_cli.artefacts.ranking import read_ranking, write_ranking
from optin_cli.errors import OptinError
from optin_cli.main import app
from optin_cli.selection.select import select
from optin_cli.selection.settings import Request

BATCH, LIMIT = 250, 120
"""Damaged files that one process reads, and its seconds: a library that hangs hears no signal."""
WRONG = (None, True, -1, 1e400, "x\x1b[2J", [], {}, [[[]]], 10**30, "y" * 10_000)
FAST = ["--samples", "12", "--batch-size", "6", "--probes", "1", "--device", "cpu", "-q"]


# ---- damaged files ----


def damaged(content: bytes, draw: random.Random) -> bytes:
    """A file as disks, transfers and programs leave it."""
    at, length = draw.randrange(len(content)), draw.randint(1, 400)
    part = content[at : at + length]
    kind = draw.choice(["cut", "flip", "zeros", "noise", "twice", "lost", "text"])
    if kind == "text":
        return _other_value(content, draw) or content[:at]
    changed = {
        "cut": b"",
        "flip": bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :],
        "zeros": bytes(len(part)) + content[at + length :],
        "noise": draw.randbytes(len(part)) + content[at + length :],
        "twice": part + content[at:],
        "lost": content[at + length :],
    }
    return content[:at] + changed[kind]


def _other_value(content: bytes, draw: random.Random) -> bytes | None:
    """JSON in which one value, at any depth, is another; None for what is no JSON."""
    try:
        data = json.loads(content)
    except ValueError:
        return None
    holder = data
    while True:
        key = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        inner = holder[key]
        if isinstance(inner, dict | list) and inner and draw.random() < 0.7:
            holder = inner
            continue
        holder[key] = draw.choice(WRONG)
        return json.dumps(data).encode()


def read_all(
    kind: str, path: Path, content: bytes, read: Callable[[Path], Any], count: int, seed: int
) -> Counter:
    """Read damaged copies of a file in processes of their own; outcome -> how many."""
    found: Counter = Counter()
    for start in range(0, count, BATCH):
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(LIMIT)
            draw = random.Random(f"{kind} {seed} {start}")
            outcomes: Counter = Counter()
            for _ in range(min(BATCH, count - start)):
                path.write_bytes(damaged(content, draw))
                outcomes[outcome(read, path)] += 1
            os.write(send, json.dumps(outcomes).encode())
            os._exit(0)
        os.close(send)
        with os.fdopen(receive) as stream:
            said = stream.read()
        os.waitpid(child, 0)
        found.update(json.loads(said) if said else {"hung": min(BATCH, count - start)})
    return found


def outcome(read: Callable[[Path], Any], path: Path) -> str:
    try:
        read(path)
    except OptinError as error:
        return "refused" if error.exit_code in (1, 2, 3) and str(path.parent) in str(error) else "odd message"
    except Exception as error:
        return f"{type(error).__name__}"
    return "read"


def damaged_files(folder: Path, model: Path, pruned: Path, count: int, seed: int) -> dict[str, Counter]:
    ranking = tiny_ranking()
    write_ranking(folder / "r.h5", ranking)
    write_mask(folder / "m.json", select(ranking, Request(flops=0.6)))
    write_latency_table(folder / "t.json", latency_table(ranking.sites))
    family = find_family(["bert"])
    assert family is not None
    (folder / "f.yaml").write_text(family_to_yaml(family))
    shutil.copytree(pruned, folder / "pruned")

    def as_it_was(path: Path) -> None:
        """A ranking has a digest of everything: what can be read is what was written."""
        if read_ranking(path).digest != ranking.digest:
            raise AssertionError("read, and other than written")

    kinds: dict[str, tuple[Path, Callable[[Path], Any]]] = {
        "ranking (HDF5)": (folder / "r.h5", as_it_was),
        "mask (JSON)": (folder / "m.json", read_mask),
        "latency table (JSON)": (folder / "t.json", read_latency_table),
        "record of a pruned model (JSON)": (folder / "pruned" / FILE_NAME, lambda p: read_pruned(p.parent)),
        "family table (YAML)": (folder / "f.yaml", read_family),
        "header of safetensors": (
            folder / "pruned" / "model.safetensors",
            lambda path: check_weights(path.parent),
        ),
    }
    found = {}
    for kind, (path, read) in kinds.items():
        content = path.read_bytes()
        found[kind] = read_all(kind, path, content, read, count, seed)
        path.write_bytes(content)
    return found


# ---- signals ----


def run_in_child(args: list[object]) -> int:
    """Start a command in a forked process, in which every library is imported already; its id."""
    child = os.fork()
    if child:
        return child
    from optin_cli import interrupts

    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs start with it ignored
    interrupts.install()
    try:
        code = app([str(arg) for arg in args], standalone_mode=False)
        os._exit(int(code or 0))
    except SystemExit as end:
        os._exit(int(end.code or 0))
    except BaseException as error:
        if (code := interrupts.exit_code()) is not None:
            os._exit(code)
        os._exit(getattr(error, "exit_code", 1))


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def content_of(path: Path) -> str:
    """What an artefact says, whenever it was made; raises where it is damaged."""
    if path.suffix == ".h5":
        return read_ranking(path).digest
    if path.suffix == ".json":
        return read_mask(path).digest
    record = read_pruned(path)
    check_weights(path)
    weights = hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
    return digest_json([record.kept, weights])


def signalled(
    name: str, args: list[object], output: Path, number: int, runs: int, draw: random.Random
) -> Counter:
    """Send a signal at a random moment of a command, again and again; outcome -> how many."""
    found: Counter = Counter()
    _clear(output)
    started = time.perf_counter()
    assert ended(run_in_child(args)) == 0, name
    duration, expected = time.perf_counter() - started, content_of(output)
    for _ in range(runs):
        _clear(output)
        child = run_in_child(args)
        time.sleep(draw.uniform(0, duration))
        os.kill(child, number)
        code = ended(child)
        finished, interrupted = code == 0, {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
        if output.exists() and content_of(output) != expected:
            found["another result"] += 1
        elif not finished and code != interrupted[signal.Signals(number)]:
            found[f"exit {code}"] += 1
        elif ended(run_in_child(args)) != 0 or content_of(output) != expected:
            found["rerun differs"] += 1
        elif left := [p.name for p in output.parent.iterdir() if p.name.startswith(f".{output.name}.")]:
            found[f"left {len(left)}"] += 1
        else:
            found["finished before it" if finished else "stopped, and the rerun is the same"] += 1
    return found


def _clear(output: Path) -> None:
    for path in output.parent.glob(f"*{output.name}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in output.parent.glob(f".{output.name}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def signals(folder: Path, model: Path, data: Path, runs: int, seed: int) -> dict[str, Counter]:
    ranking, mask, small = folder / "r.h5", folder / "m.json", folder / "small"
    commands: dict[str, tuple[list[object], Path]] = {
        "score": (["score", model, "--data", data, "-o", ranking, *FAST], ranking),
        "select": (["select", ranking, "--flops", 0.6, "-o", mask, "-q"], mask),
        "apply": (
            [
                "apply",
                model,
                mask,
                "-o",
                small,
                "--device",
                "cpu",
                "--memory",
                "1KiB",
                "--samples",
                24,
                "--batch-size",
                6,
                "-q",
            ],
            small,
        ),
    }
    draw, found = random.Random(seed), {}
    for name, (args, output) in commands.items():
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
            what = f"{name}, {signal.Signals(number).name}"
            found[what] = signalled(name, args, output, number, runs, draw)
        assert ended(run_in_child([*args, "--force"])) == 0
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--damaged", type=int, default=4000, help="damaged files of each kind")
    parser.add_argument("--signals", type=int, default=40, help="signals of each kind to each command")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        tempfile.tempdir = str(folder / "tmp")
        (folder / "tmp").mkdir()
        (folder / "work").mkdir()
        (folder / "files").mkdir()
        model, data = tiny_model("bert", folder / "model"), tiny_text_csv(folder)
        found = signals(folder / "work", model, data, options.signals, options.seed)
        spilled = [path.name for path in (folder / "tmp").glob("optin-*")]
        pruned = folder / "work" / "small"
        found |= damaged_files(folder / "files", model, pruned, options.damaged, options.seed)
    print(f"seed {options.seed}; scratch folders left: {len(spilled)}\n")
    print("| fault | tried | outcome |\n|---|---|---|")
    for what, outcomes in found.items():
        said = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
        print(f"| {what} | {sum(outcomes.values())} | {said} |")


if __name__ == "__main__":
    main()
