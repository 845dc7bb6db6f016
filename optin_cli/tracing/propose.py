"""Propose the family table of a model: find blocks and sites, keep what holds, say what does not and why."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from optin_cli.architectures.families import DOCS
from optin_cli.architectures.resolve import family_of
from optin_cli.architectures.schema import Family, SiteTable
from optin_cli.errors import InputError, UnknownArchitecture, param
from optin_cli.loading.checkpoint import open_module
from optin_cli.structure.anatomy import HEADS, Anatomy
from optin_cli.structure.layers import matrix
from optin_cli.tracing.blocks import Blocks, find_blocks
from optin_cli.tracing.describe import describe, name_group, name_width
from optin_cli.tracing.flow import is_layer, outputs_of, watch
from optin_cli.tracing.record import (
    BATCH,
    RUN_ERRORS,
    Run,
    brief,
    cacheless,
    constants,
    modality_of,
    record,
    rolled,
    seeded,
    smaller_images,
    synthetic_inputs,
    unsettle,
)
from optin_cli.tracing.report import SHOWN, alike, first_reasons, merged
from optin_cli.tracing.sites import LeftOut, TracedSite, find_sites
from optin_cli.tracing.tables import TableMatch, as_tables
from optin_cli.tracing.verify import Trial, TrialFailure, complete, empties, mismatch
from optin_cli.tracing.whole_model import TraceResult, WholeModel

_EXTRAS = ("use_cache", "output_attentions")  # one grows from trial to trial, the other has an axis of heads
EMPTY = (
    f"can't run without any unit: prune with a minimum ({param('min_heads', 1)}, {param('min_neurons', 1)})"
)


OnProgress = Callable[[float, float, str], None]


def _silent(done: float, total: float, what: str) -> None:
    """For callers that want no news."""


@dataclass
class Row:
    """One table of the proposal."""

    table: SiteTable
    blocks: tuple[int, ...]
    units: tuple[tuple[int, int], ...]
    """(units, features of one) of its sites, each pair once."""
    macs: float
    """Of all its sites, for one example of the trial."""
    params: float
    notes: list[str] = field(default_factory=list)


@dataclass
class Proposal:
    """The proposal for a model."""

    model: str
    family: Family
    anatomy: Anatomy
    rows: list[Row]
    left: list[LeftOut]
    listed: str
    """The family that describes this model already; '' if none does."""
    positions: int
    """Tokens (or positions) of an example of the trial."""
    untrained: bool = False
    """True if the weights were random, for want of others."""


def propose(
    spec: str,
    task: str | None = None,
    modality: str | None = None,
    on_progress: OnProgress = _silent,
    trust_remote_code: bool = False,
) -> Proposal:
    """Trace the model that `spec` names, on the CPU and in float32. `on_progress` hears (done, total, what). Weights
    that are not on this machine are drawn at random: a table does not depend on them.

    Raises `InputError` saying what was looked for where no blocks, or no sites in them, are found.
    """
    with seeded():
        source, module, _, _ = open_module(spec, task, weights=False, trust_remote_code=trust_remote_code)
    module.to("cpu", torch.float32).eval().requires_grad_(False)
    reads = modality_of(module, source.library, modality)
    inputs = synthetic_inputs(module, source.library, reads)
    proposal = trace(
        module, inputs, library=source.library, modality=reads, spec=spec, on_progress=on_progress
    )
    return replace(proposal, untrained=source.untrained)


def _refuse_two_streams(module: Any) -> None:
    """Raise `InputError` for an encoder and a decoder: what is traced is one list of blocks."""
    if "decoder_input_ids" not in inspect.signature(module.forward).parameters:
        return
    name = _listed(module)
    raise InputError(
        f"a {type(module).__name__} is an encoder and a decoder, and one list of blocks is traced",
        f"it is listed already, as {name!r}, and needs no table"
        if name
        else f"write its table by hand, with `streams` as `bart` has them (optin families --json): see {DOCS}",
    )


def trace(
    module: Any,
    inputs: Mapping[str, Tensor],
    *,
    library: str,
    modality: str,
    spec: str = "",
    on_progress: OnProgress = _silent,
) -> Proposal:
    """Trace a model in eval mode on a batch of `BATCH` inputs. Its weights are moved a little, in place."""
    _refuse_two_streams(module)
    inputs = dict(inputs)
    module.requires_grad_(False)
    on_progress(0, 1, "running the model")
    try:
        arguments = cacheless(module, inputs) if modality == "text" else {}
        for extra in _EXTRAS:
            if getattr(getattr(module, "config", None), extra, False):
                setattr(module.config, extra, False)
        small = smaller_images(module, inputs)
        unsettle(module, small)
        run = record(module, small)
        other = record(module, rolled(small))
        flow = watch(module, small)
    except RUN_ERRORS as error:
        raise InputError(
            f"{type(module).__name__} does not run on made-up inputs ({', '.join(inputs)}): {brief(error)}",
            f"say {param('modality', 'text')} or {param('modality', 'image')} if it reads the other, or write "
            "its table by hand",
        ) from error
    found, unfit = find_sites(module, flow, run, on_progress)
    del flow
    found = _costly(module, run, other, found)
    if not found:
        raise _nothing(module, first_reasons(unfit))
    weights: dict[str, float] = {}
    for site in found:
        weights[site.root] = weights.get(site.root, 0) + _weight(module, site)
    try:
        blocks = find_blocks(module, run, weights)
    except InputError as error:
        raise InputError(error.template[0] + first_reasons(unfit), error.template[1]) from error
    held, left = _try_all(module, run, blocks, found, bool(arguments), on_progress)
    left += _never_called(module, run, blocks)
    inside = [gone for gone in unfit if _in_one_block(blocks, gone.layers)]
    tables, mixed = as_tables([module.get_submodule(path) for path in blocks.paths], held)
    left = merged([*left, *inside, *mixed], blocks)
    if not tables:
        raise _nothing(module, "".join(f"; {gone.where}: {gone.why}" for gone in left[:SHOWN]))
    on_progress(0, 1, "checking all sites on the whole model")
    quick = WholeModel(module, small, run, blocks)
    whole = quick if small is inputs else WholeModel(module, inputs, record(module, inputs), blocks)
    family = _family(module, blocks, library, modality)
    checked = whole.check(replace(family, arguments=arguments, chained=quick.is_chained()), tables)
    rows = [_row(module, run, blocks, checked, fitted) for fitted in checked.fitted]
    listed = _listed(module)
    return Proposal(
        spec, checked.family, checked.anatomy, rows, [*left, *checked.left], listed, checked.positions
    )


def _family(module: Any, blocks: Blocks, library: str, modality: str) -> Family:
    """A family without tables yet."""
    name = getattr(getattr(module, "config", None), "model_type", None) or type(module).__name__
    match = f"torchvision.{name}" if library == "torchvision" else name
    return Family(name.lower(), (match,), blocks.table, (), modality, layout=blocks.layout)


def _listed(module: nn.Module) -> str:
    try:
        return family_of(module).name
    except UnknownArchitecture:
        return ""


def _row(module: nn.Module, run: Run, blocks: Blocks, checked: TraceResult, fitted: TableMatch) -> Row:
    table = fitted.table
    sites = [s for s in checked.anatomy if s.label == table.label and s.block in fitted.blocks]
    notes = [note] if (note := checked.notes.get(table.consumer)) else []
    path = blocks.paths[fitted.blocks[0]]
    call = run.once(path)
    assert call is not None
    trial = Trial(module.get_submodule(path), call, "", cached=bool(checked.family.arguments))
    if table.bypass is None and empties(trial, table) is None:
        notes.append(EMPTY)
    units = tuple(dict.fromkeys((site.units, site.width) for site in sites))
    macs = sum(site.macs(checked.positions, site.units) for site in sites)
    params = sum(site.params(site.units) for site in sites)
    return Row(table, fitted.blocks, units, macs, params, notes)


def _pooled(module: nn.Module, run: Run, site: TracedSite) -> bool:
    """Return whether all layers of a site see one position of an example: a squeeze-and-excite, a head."""
    for path in (site.consumer, *(producer.path for producer in site.producers)):
        call = run.once(path)
        outputs = outputs_of(module.get_submodule(path))
        if call is None or call.gave is None or call.gave.numel() != BATCH * outputs:
            return False
    return True


def _costly(module: nn.Module, run: Run, other: Run, found: Sequence[TracedSite]) -> list[TracedSite]:
    """Sites that compute something for every position of every example, or are alike to some that do."""
    idle = constants(run, other)
    kinds: dict[str, list[TracedSite]] = {}
    for site in found:
        if site.consumer not in idle:
            kinds.setdefault(alike(site.consumer), []).append(site)
    worth = {kind for kind, sites in kinds.items() if not all(_pooled(module, run, site) for site in sites)}
    return [
        replace(site, producers=tuple(replace(p, per_batch=p.path in idle) for p in site.producers))
        for site in found
        if alike(site.consumer) in worth and site.consumer not in idle
    ]


def _weight(module: nn.Module, site: TracedSite) -> float:
    return matrix(module.get_submodule(site.consumer)).numel()


def _in_one_block(blocks: Blocks, layers: Sequence[str]) -> bool:
    homes = {blocks.of(layer) for layer in layers}
    return len(homes) == 1 and None not in homes


def _never_called(module: nn.Module, run: Run, blocks: Blocks) -> list[LeftOut]:
    """Layers in the blocks whose weights are used, if at all, without calling them."""
    why = "it is never called, so what becomes of its units can't be seen"
    return [
        LeftOut(path, why)
        for path, layer in module.named_modules()
        if is_layer(layer) and path not in run.calls and blocks.of(path)
    ]


def _nothing(module: nn.Module, reasons: str) -> InputError:
    return InputError(
        f"nothing prunable is found in {type(module).__name__}: looked for Linear, Conv1D and Conv2d layers each of "
        f"whose inputs is made of one unit (neuron, channel, head) of the layers before{reasons}",
        "layers of other kinds (Conv1d, Conv3d) can't be sliced",
    )


def _try_all(
    module: nn.Module,
    run: Run,
    blocks: Blocks,
    found: Sequence[TracedSite],
    cached: bool,
    on_progress: OnProgress,
) -> tuple[list[tuple[SiteTable, int]], list[LeftOut]]:
    """(tables that hold, each in one block), and those that don't."""
    held: list[tuple[SiteTable, int]] = []
    left: list[LeftOut] = []
    solved: list[Solved] = []
    outside: dict[str, list[TracedSite]] = {}
    for done, site in enumerate(found):
        on_progress(done, len(found), f"trying {site.consumer}")
        block = blocks.of(site.root)
        call = run.once(block) if block else None
        if block is None or call is None:
            if not any(blocks.of(layer) for layer in site.layers):  # else it is the residual stream
                outside.setdefault(alike(site.consumer), []).append(site)
            continue
        root = site.root.removeprefix(block).removeprefix(".")
        trial = Trial(module.get_submodule(block), call, root, cached)
        table = describe(module, site, block)
        try:
            held.append((_solve(trial, table, site, solved), blocks.paths.index(block)))
        except TrialFailure as reason:
            left.append(LeftOut(site.consumer, str(reason)))
    why = "these are outside of the chain of blocks: what each gives is not what the next one is given"
    left += [LeftOut(pattern, why) for pattern, sites in outside.items() if len(sites) > 1]
    return held, left


@dataclass(frozen=True)
class Solved:
    """A table as it was found in a block and as it was completed there."""

    found: SiteTable
    completed: SiteTable
    block: str
    """The modules of the block, with their sizes."""


def _solve(trial: Trial, table: SiteTable, site: TracedSite, solved: list[Solved]) -> SiteTable:
    """The completed table; first as it was completed before: in a block of the same modules without another trial, else
    where one trial confirms it. The whole model is compared at the end."""
    modules = repr(trial.block)
    for before in solved:
        if before.found == table and before.block == modules:
            return before.completed
    for before in solved:
        nothing_to_add = before.completed == before.found and alike(repr(before.found)) == alike(repr(table))
        if before.found != table and not nothing_to_add:
            continue
        again = before.completed if before.found == table else table
        if mismatch(trial, again, once=True) is None:
            solved.append(Solved(table, again, modules))
            return again
    full = name_group(trial, table, site.group) if site.group > 1 else table
    full = complete(trial, full, site.units, site.width)
    if site.kind == HEADS:
        full = name_width(trial, full, site.width // site.group)
    full = empties(trial, full) or full
    solved.append(Solved(table, full, modules))
    return full
