"""Damaged files by kind: each is read as it was or refused with one of optin's errors, within the time limit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.artefacts import latency_table, tiny_ranking

from optin_cli.architectures.families import family_to_yaml, find_family, read_family
from optin_cli.artefacts.latency import read_latency_table, write_latency_table
from optin_cli.artefacts.mask import read_mask, write_mask
from optin_cli.artefacts.pruned import FILE_NAME, check_weights, read_pruned
from optin_cli.artefacts.ranking import read_ranking, write_ranking
from optin_cli.errors import OptinError
from optin_cli.selection.select import select
from optin_cli.selection.settings import Request

EARLIER = Path(__file__).resolve().parents[2] / "tests" / "artefacts" / "files"
BATCH, LIMIT = 250, 120
"""Damaged files that one process reads, and its seconds: a library that hangs hears no signal."""
WRONG = (None, True, -1, 1e400, "x\x1b[2J", [], {}, [[[]]], 10**30, "y" * 10_000)


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


def damaged_files(folder: Path, pruned: Path, count: int, seed: int) -> dict[str, Counter]:
    ranking = tiny_ranking()
    write_ranking(folder / "r.h5", ranking)
    write_mask(folder / "m.json", select(ranking, Request(flops=0.6)))
    shutil.copy(EARLIER / "mask-4.json", folder / "m4.json")
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
        "mask with a schedule of merges, and ranks (JSON)": (folder / "m4.json", read_mask),
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
