"""Try a site: the sliced block must compute what the masked one does. What else has to change is found by trying."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from optin_cli.architectures.resolve import dissect
from optin_cli.architectures.schema import Family, SiteTable
from optin_cli.errors import OptinError
from optin_cli.structure.anatomy import HEADS, Anatomy, Bypass, UnitInput
from optin_cli.structure.hidden_states import cache_argument
from optin_cli.tracing.record import RUN_ERRORS, Call, brief, seeded, tensors_of
from optin_cli.tracing.sites import common_parent
from optin_cli.transforms.masking import masked, masks_from_keep
from optin_cli.transforms.slicing import sharing_copy, slice_model

TOLERANCE = 1e-5  # of the largest output, or of 1
SLICED = ("weight", "bias", "running_mean", "running_var")
_MOST_TRIES = 64
_STOPS = "it does not run without"

Change = Callable[[SiteTable], SiteTable]


class TrialFailure(Exception):
    """A site does not hold, and why."""


class Holder(nn.Module):
    """A single block, as a model that `dissect` takes."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block


@dataclass(frozen=True)
class Trial:
    """A block, the arguments that the model calls it with, and the module in it that holds a site."""

    block: nn.Module
    call: Call
    root: str
    """Path in the block of the module that holds the site; '' for the block itself."""
    cached: bool = False
    """True if the model fills a cache of keys and values by default."""

    def run(self, block: nn.Module) -> list[Tensor]:
        """The hidden states that `block` gives. What else it returns has other sizes: attention weights."""
        with torch.no_grad(), seeded():
            args = [_copied(value) for value in self.call.args]
            kwargs = {name: _copied(value) for name, value in self.call.kwargs.items()}
            return tensors_of(block(*args, **kwargs))[:1]


def _copied(value: Any) -> Any:
    """An argument that a block may change in place."""
    return value.clone() if isinstance(value, Tensor) else value


def complete(trial: Trial, table: SiteTable, units: int, width: int) -> SiteTable:
    """`table` with what else must change when units go: counts, tensors, arguments.

    Raises `TrialFailure` with the reason when nothing makes the sliced block equal to the masked one.
    """
    why = ""
    named, others = _changes(trial, table, units, width)
    for tries, chosen in enumerate(_orders(named, others)):
        if tries >= _MOST_TRIES:
            break
        changed = _with(table, chosen)
        if (reason := mismatch(trial, changed)) is None:
            return _without_needless(trial, table, chosen, keep=named)
        if not why or why.startswith(_STOPS):  # how it computes something else says more than where it stops
            why = reason if not why or not reason.startswith(_STOPS) else why
    raise TrialFailure(why)


def mismatch(trial: Trial, table: SiteTable, once: bool = False) -> str | None:
    """Return what goes wrong when units of the site are sliced away, several numbers of them or `once`; None if nothing
    does."""
    try:
        anatomy = _anatomy(trial.block, table)
    except OptinError as error:
        return error.what
    units = anatomy.sites[0].units
    if units < 2:
        return "it has one unit only"
    dense = trial.run(trial.block)
    generator = torch.Generator().manual_seed(units)
    matters = False
    for gone in [units // 2] if once else sorted({1, units // 2, units - 1}):
        kept = sorted(torch.randperm(units, generator=generator)[gone:].tolist())
        try:
            expected = _masked(trial, anatomy, kept)
        except RUN_ERRORS as error:
            return f"it can't be masked: {brief(error)}"
        if (reason := _difference(trial, anatomy, kept, expected)) is not None:
            return reason
        matters |= not same(expected, dense)
    return None if matters else "its units change nothing"


def empties(trial: Trial, table: SiteTable) -> SiteTable | None:
    """`table`, with a bypass where it needs one, so that the block runs without any units; None if it can't."""
    parts = trial.root.split(".") if trial.root else []
    around = [".".join(parts[:depth]) for depth in range(len(parts), 0, -1)]
    caching = trial.cached and table.kind == HEADS
    bypasses = [_bypass(trial, path) for path in around]
    for bypass in [b for b in bypasses if b.cache] if caching else [None, *bypasses]:
        changed = replace(table, bypass=bypass)
        try:
            anatomy = _anatomy(trial.block, changed)
        except OptinError:
            continue
        if _difference(trial, anatomy, [], _masked(trial, anatomy, [])) is None:
            return changed
    return None


def _bypass(trial: Trial, path: str) -> Bypass:
    """A bypass of a module of the block, which gives as many things as it does."""
    module = trial.block.get_submodule(path)
    given: list[Any] = []
    handle = module.register_forward_hook(lambda _, __, output: given.append(output))
    try:
        trial.run(trial.block)
    finally:
        handle.remove()
    in_tuple = len(given[0]) if given and isinstance(given[0], tuple) else 0
    return Bypass(path, in_tuple, cache_argument(module) if trial.cached else "")


def _anatomy(block: nn.Module, table: SiteTable) -> Anatomy:
    return dissect(Holder(block), Family("trace", ("Holder",), ("block",), (table,)), costs=False)


def _masked(trial: Trial, anatomy: Anatomy, kept: Sequence[int]) -> list[Tensor]:
    keep = {anatomy.sites[0].name: list(kept)}
    with masked(Holder(trial.block), anatomy, masks_from_keep(anatomy, keep)):
        return trial.run(trial.block)


def _difference(trial: Trial, anatomy: Anatomy, kept: Sequence[int], expected: list[Tensor]) -> str | None:
    """Describe how the sliced block differs from what is expected of it."""
    site = anatomy.sites[0]
    try:
        smaller = Holder(sharing_copy(trial.block))
        slice_model(smaller, anatomy, {site.name: list(kept)})
        found = trial.run(smaller.block)
    except RUN_ERRORS as error:
        return f"{_STOPS} {site.units - len(kept)} of its {site.units} units: {brief(error)}"
    return None if same(found, expected) else "the sliced block does not compute what the masked one does"


def same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Return whether outputs agree to `TOLERANCE`."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return False
    return all(
        bool(torch.isfinite(b).all())
        and float((a - b).abs().max()) <= TOLERANCE * max(1.0, float(b.abs().max()))
        for a, b in zip(found, expected, strict=True)
        if b.numel()
    )


# ---- what else may have to change ----


def _changes(trial: Trial, table: SiteTable, units: int, width: int) -> tuple[list[Change], list[Change]]:
    """(attributes whose names say that they count heads, everything else of the right size)."""
    named: list[Change] = []
    others: list[Change] = []
    root = trial.block.get_submodule(trial.root)
    layers = {table.consumer, *table.carried, *table.readers, *(p.path for p in table.producers)}
    for below, module in root.named_modules():
        path = ".".join(filter(None, (trial.root, below)))
        for attribute, value in vars(module).items():
            if path in layers or type(value) is not int or attribute.startswith("_"):
                continue
            place = ".".join(filter(None, (path, attribute)))
            for kind in _kinds(attribute, value, units, units * width):
                heads = table.kind == HEADS and "head" in attribute
                (named if heads else others).append(_count(place, kind))
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            place = ".".join(filter(None, (path, name)))
            if path in layers and name in SLICED:
                continue
            for axis, size in enumerate(tensor.shape):
                if size == units and place not in table.tensors:
                    others.append(_tensor(place, axis))
    others += [_input(given) for given in _inputs(trial, table, units)]
    return named, others


def _kinds(attribute: str, value: int, units: int, features: int) -> Iterator[str]:
    """Return what an attribute may count. The size of one head is never a count."""
    if attribute.endswith("head_dim") or (attribute.endswith("head_size") and "all" not in attribute):
        return
    if value == units:
        yield "units"
    if value == features != units:
        yield "features"


def _inputs(trial: Trial, table: SiteTable, units: int) -> Iterator[UnitInput]:
    """Tensor arguments, of the innermost module that holds all producers, with an axis of so many slices."""
    inner = common_parent([producer.path for producer in table.producers]) or trial.root
    if not inner:
        return
    target = trial.block.get_submodule(inner)
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = target.register_forward_pre_hook(lambda _, a, k: seen.append((a, k)), with_kwargs=True)
    try:
        trial.run(trial.block)
        bound = inspect.signature(target.forward).bind(*seen[0][0], **seen[0][1])
    except (IndexError, TypeError):  # it never runs, or takes what its forward does not name
        return
    finally:
        handle.remove()
    for name, value in list(bound.arguments.items())[1:]:
        if isinstance(value, Tensor):
            for axis, size in enumerate(value.shape):
                if size == units:
                    yield UnitInput(inner, name, axis - value.dim())


def _count(path: str, kind: str) -> Change:
    return lambda table: replace(table, counts={**table.counts, path: kind})


def _tensor(path: str, axis: int) -> Change:
    return lambda table: replace(table, tensors={**table.tensors, path: axis})


def _input(given: UnitInput) -> Change:
    return lambda table: replace(table, unit_inputs=(*table.unit_inputs, given))


def _with(table: SiteTable, changes: Sequence[Change]) -> SiteTable:
    for change in changes:
        table = change(table)
    return table


def _orders(named: list[Change], others: list[Change]) -> Iterator[list[Change]]:
    """Yield what to try, the likely first: only names, one or two more, everything, all but one, one alone."""
    yield named
    for one in others:
        yield [*named, one]
    for i, one in enumerate(others):
        for other in others[i + 1 :]:
            yield [*named, one, other]
    every = [*named, *others]
    if len(others) > 2:
        yield every
        for one in others:
            yield [change for change in every if change is not one]
    for one in named:
        yield [change for change in named if change is not one]


def _without_needless(
    trial: Trial, table: SiteTable, chosen: list[Change], keep: Sequence[Change]
) -> SiteTable:
    """The table with those changes that were needed, and those whose names say that they belong."""
    for change in list(chosen):
        if change in keep:
            continue
        fewer = [other for other in chosen if other is not change]
        if mismatch(trial, _with(table, fewer)) is None:
            chosen = fewer
    return _with(table, chosen)
