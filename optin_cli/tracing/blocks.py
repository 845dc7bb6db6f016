"""Find the blocks: modules of one pattern of names, each of which receives what the one before gives."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from optin_cli.architectures.families import DOCS
from optin_cli.architectures.resolve import base_prefix, find_streams
from optin_cli.architectures.schema import Family, SiteTable
from optin_cli.errors import InputError, param
from optin_cli.structure.anatomy import NCHW, NHWC, TOKENS
from optin_cli.tracing.record import BATCH, Call, Key, Run

_FINE_ENOUGH = 0.5  # of the weights: many small blocks that hold so many are better than few large ones
_DETOUR = 4  # modules between two blocks, at most


@dataclass(frozen=True)
class Blocks:
    """The blocks of a model, in the order they run."""

    paths: tuple[str, ...]
    """From the model; `get_submodule` paths."""
    table: str | tuple[str, ...]
    """As `Family.blocks` has it."""
    layout: str

    def of(self, path: str) -> str | None:
        """The block that holds a module, or is it."""
        return next((block for block in self.paths if within(path, block)), None)


def within(path: str, block: str) -> bool:
    """Return whether a module is `block` or inside it."""
    return path == block or path.startswith(f"{block}.")


def find_blocks(module: nn.Module, run: Run, weights: Mapping[str, float]) -> Blocks:
    """The chain of blocks that holds most of `weights`, path of a module -> what it weighs.

    Raises `InputError` saying what was looked for when there is none.
    """
    prefix = base_prefix(module)
    groups: dict[str, list[str]] = {}
    for path in run.order:
        call = run.once(path)
        if call and path.startswith(prefix) and _passes_hidden_states(call) and re.search(r"\d", path):
            groups.setdefault(re.sub(r"\d+", "#", path), []).append(path)
    chains = [found for paths in groups.values() if len(paths) > 1 for found in _chains(run, paths, weights)]
    most = max((chain.held for chain in chains), default=0)
    if not most:
        raise InputError(
            f"no blocks are found in {type(module).__name__}: looked for two or more modules whose names differ in "
            "a number, each of which is given what the one before gives (examples first) and holds whole sites"
            + _near_miss(run, groups, weights),
            f"write its table by hand and give it as {param('family', meta='FILE.yaml')}: see {DOCS}",
        )
    fine = [chain for chain in chains if chain.held >= _FINE_ENOUGH * most]
    chain = max(fine, key=_rank).paths
    layout = _layout(module, run, chain)
    return Blocks(chain, _as_table(module, prefix, chain), layout)


def _near_miss(run: Run, groups: Mapping[str, Sequence[str]], weights: Mapping[str, float]) -> str:
    """Return what keeps the modules that hold most sites from being blocks; '' if nothing does."""
    several = [path for path, calls in run.calls.items() if len(calls) > 1 and path in weights]
    if several:
        return (
            f". {several[0]} runs {len(run.calls[several[0]])} times: blocks that share a module are not traced, and "
            "need a table written by hand (`repeats`)"
        )
    for pattern, paths in groups.items():
        held = [path for path in paths if any(within(site, path) for site in weights)]
        if len(held) > 1:
            return (
                f". {pattern.replace('#', '*')} hold sites, but {held[1]} is not given what {held[0]} gives"
            )
    return ""


def _passes_hidden_states(call: Call) -> bool:
    given, gave = call.given, call.gave
    if given is None or gave is None or not (given.is_floating_point() and gave.is_floating_point()):
        return False
    return given.dim() == gave.dim() in (3, 4) and given.shape[0] == gave.shape[0] == BATCH


@dataclass(frozen=True)
class _Chain:
    paths: tuple[str, ...]
    """Modules of one pattern of names, and what is between them."""
    holders: int
    """The number of those of the pattern that hold sites."""
    held: float
    """The weights of all their sites."""


def _rank(chain: _Chain) -> tuple[float, ...]:
    """Rather many blocks with many sites, elements of lists, small ones and little between them."""
    parts = chain.paths[0].split(".")
    return chain.holders, chain.held, parts[-1].isdigit(), len(parts), -len(chain.paths)


def _chains(run: Run, paths: Sequence[str], weights: Mapping[str, float]) -> list[_Chain]:
    """Runs of modules that pass hidden states on, two or more of which hold sites."""
    chains: list[list[str]] = [[paths[0]]]
    readers: dict[Key, list[str]] = {}
    for path in run.order:
        call = run.once(path)
        if call and call.reads:
            readers.setdefault(call.reads, []).append(path)
    for before, after in pairwise(paths):
        between = _between(run, readers, before, after)
        if between is None:
            chains.append([after])
        else:
            chains[-1] += [*between, after]
    found = []
    for chain in chains:
        holders = [path for path in chain if path in paths and any(within(site, path) for site in weights)]
        held = sum(weight for site, weight in weights.items() if any(within(site, path) for path in chain))
        if len(holders) > 1:
            found.append(_Chain(tuple(chain), len(holders), held))
    return found


def _between(run: Run, readers: Mapping[Key, list[str]], before: str, after: str) -> list[str] | None:
    """Modules through which the output of one block reaches the next; None where something else happens to it."""
    goal = run.calls[after][0].reads
    ways: list[tuple[str, ...]] = [()]
    for _ in range(_DETOUR):
        longer = []
        for way in ways:
            reached = run.calls[way[-1] if way else before][0].writes
            if reached == goal:
                return list(way)
            longer += [
                (*way, path)
                for path in readers.get(reached, [])
                if not within(after, path) and not within(before, path) and path not in way
                and _is_hidden(run, path)
            ]  # fmt: skip
        ways = longer
    return None


def _is_hidden(run: Run, path: str) -> bool:
    call = run.once(path)
    return call is not None and _passes_hidden_states(call)


def _layout(module: nn.Module, run: Run, chain: Sequence[str]) -> str:
    """Return the layout of hidden states: where the axis is whose size differs from all others."""
    shapes = []
    for path in chain:
        call = run.once(path)
        if call is not None and call.gave is not None:
            shapes.append(tuple(call.gave.shape))
    if len({len(shape) for shape in shapes}) > 1:
        raise InputError(f"the blocks of {type(module).__name__} give hidden states of several layouts")
    if len(shapes[0]) == 3:
        return TOKENS
    if any(shape[1] != shape[2] == shape[3] for shape in shapes):
        return NCHW
    if any(shape[1] == shape[2] != shape[3] for shape in shapes):
        return NHWC
    first = module.get_submodule(chain[0])
    return NCHW if any(isinstance(child, nn.Conv2d) for child in first.modules()) else NHWC


def _as_table(module: nn.Module, prefix: str, chain: Sequence[str]) -> str | tuple[str, ...]:
    """The shortest way to say which modules the blocks are: their parent, patterns, or all of them."""
    names = [path.removeprefix(prefix) for path in chain]
    parent = names[0].rpartition(".")[0]
    patterns = tuple(dict.fromkeys(".".join(map(_pattern, name.split("."))) for name in names))
    for table in (parent, patterns, tuple(names)):
        if table and _found(module, prefix, table) == list(chain):
            return table
    raise InputError(
        f"the blocks of {type(module).__name__} are not registered in the order in which they run: {names[0]} .. "
        f"{names[-1]}"
    )


def _pattern(part: str) -> str:
    return "*" if part.isdigit() else re.sub(r"\d+", "[0-9]*", part)


def _found(module: nn.Module, prefix: str, table: str | tuple[str, ...]) -> list[str]:
    nothing: tuple[SiteTable, ...] = ()
    try:
        return find_streams(module, Family("", (), table, nothing), prefix)[0]
    except InputError:
        return []
