"""Make a latency table: time a block of each shape with ever fewer units of one site.

A site's milliseconds at n units are the block's time with n of them less its time with none, the block's other
sites being whole. What the blocks' sites do not explain of the whole model's time is its fixed rest, so the dense
model is predicted exactly and a pruned one as far as sub-layers add up.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from optin_cli.artefacts.changes import changes, explain, explain_new
from optin_cli.artefacts.facts import Curve, RankTimes, TimedModel, TimedSetting, TimedSite
from optin_cli.artefacts.latency import LatencyTable, processor_name, read_latency_table
from optin_cli.artefacts.provenance import library_versions
from optin_cli.errors import ArtefactError, OutputDiffers, UsageError, param
from optin_cli.execution.block_calls import BlockCall, Call, around, block_calls, first_block
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.measure.inputs import dummy_inputs
from optin_cli.measure.latency import Progress, call_ms, device_name
from optin_cli.structure.anatomy import HEADS, Anatomy, Site
from optin_cli.transforms.slicing import sharing_copy, slice_model

_INTERVALS = 24
"""Of the first grid, at most: 25 sizes show where a curve bends; what bends is looked at more closely."""
_FINEST = {HEADS: 1}
"""Units between two sizes, at least: kernels change at multiples of 8 and up, whole heads anywhere."""
_FINEST_OTHER = 8
_BEND = 0.02
"""Part of a block's time by which a size may miss the line through its neighbours before the gap is halved."""
_MOST_SIZES = 96
_RANKS, _LEAST_STEP = 8, 4
"""Ranks timed, at most, of heads that can be cut, and dimensions between two of them, at least."""
_HEADS = 6
"""Numbers of heads that each of those ranks is timed at, at most."""
_QUANTILE = 0.2
_MOST_ROUNDS = 60
_WARMUP = 2
_SHORTEST_MS = 1.0
"""A timed call lasts at least this long: shorter ones are repeated back to back."""
Shape = tuple[int, int]
"""(units, rank of heads) of a site; the rank is 0 where they are whole."""


def table_setting(model: OpenModel, batch_size: int, size: int) -> TimedSetting:
    """The conditions that a table is made for: times hold for no others."""
    cpu = model.device.type == "cpu"
    return {
        "device": device_name(model.device),
        "processor": processor_name() if cpu else "",
        "threads": torch.get_num_threads() if cpu else 0,
        "dtype": model.dtype_name,
        "batch_size": batch_size,
        "size": size,
    }


def existing(path: Path, model: OpenModel, batch_size: int, size: int) -> LatencyTable | None:
    """Return the latency table at `path` if it is of this model and setting; None if there is no file.

    Raises `OutputDiffers` for a table of another model or setting, `UsageError` for any other file.
    """
    if not path.exists():
        explain_new(path)
        return None
    redo = f"choose another name, or {param('force', True)} to replace it"
    try:
        table = read_latency_table(path)
    except ArtefactError as error:
        raise UsageError(f"{path} exists and is no latency table ({error.what})", redo) from error
    wanted = {"model": model.digest, **table_setting(model, batch_size, size)}
    differs = changes({"model": table.model["digest"], **table.setting}, wanted)
    explain(path, differs, wanted)
    if differs:
        raise OutputDiffers(
            f"{path} exists, made for another {', '.join(change.name for change in differs)}", redo
        )
    return table


def make_table(
    model: OpenModel,
    batch_size: int,
    size: int,
    *,
    repeats: int = 10,
    seconds: float = 5.0,
    seed: int = 0,
    on_progress: Progress = lambda *_: None,
) -> LatencyTable:
    """Time every kind of site of `model` for a batch of `batch_size` at `size` (see `latency.Setting`).

    Blocks of one shape share their measurements. Each pass over the sizes of a curve takes at least `repeats` rounds
    and about `seconds`. A model that merges tokens is timed on whole sequences. Raises `UsageError` for a setting that
    the model can't run.
    """
    inputs = dummy_inputs(model, batch_size, size, seed)
    with model.unmerged(), torch.inference_mode():
        try:
            calls = block_calls(model, inputs)
            shapes = _shapes(model, calls)
            benches = []
            for done, (site, *others) in enumerate(shapes):
                on_progress(done, len(shapes) + 1, f"timing {site.kind} of {1 + len(others)} blocks")
                seen, call = around(model, site, calls)
                benches.append(_Bench(seen, call, model.device, repeats, seconds))
                benches[-1].run()
            on_progress(len(shapes), len(shapes) + 1, "timing the whole model")
            total, blocks = _whole(model, inputs, [bench.call for bench in benches], repeats, seconds)
        except torch.OutOfMemoryError as error:
            raise UsageError(
                f"a batch of {batch_size} at size {size} does not fit in the memory of {device_name(model.device)}",
                f"use a smaller {param('batch_size')}",
            ) from error
    curves = [
        bench.curve(ms * model.anatomy.uses(bench.site.block))
        for bench, ms in zip(benches, blocks, strict=True)
    ]
    sites: dict[str, TimedSite] = {
        site.name: {"kind": site.kind, "units": site.units, "curve": index}
        for site in model.anatomy
        for index, alike in enumerate(shapes)
        if site in alike
    }
    table = LatencyTable(
        _model_facts(model), table_setting(model, batch_size, size), total, 0.0, curves, sites
    )
    explained = table.model_ms({site.name: site.units for site in model.anatomy})
    if explained > total:  # by chance, where little else is in the model
        for curve in curves:
            curve["ms"] = [ms * total / explained for ms in curve["ms"]]
    table.fixed_ms = max(total - explained, 0.0)
    table.created, table.versions = datetime.now(UTC).isoformat(timespec="seconds"), library_versions()
    return table


def _model_facts(model: OpenModel) -> TimedModel:
    return {
        "id": model.spec,
        "digest": model.digest,
        "dense_digest": model.dense["digest"],
        "family": model.family.name,
    }


def _shapes(model: OpenModel, calls: Sequence[BlockCall]) -> list[list[Site]]:
    """Sites whose units cost the same, the largest first: one of them is measured for all."""
    alike: dict[Any, list[Site]] = {}
    for site in model.anatomy:
        call = calls[first_block(model, site)]
        costs = site.macs_per_token, site.macs_per_pair, site.base_macs_per_token, site.own_share
        key = (site.kind, site.width, *costs, type(call.module), call.shapes)
        alike.setdefault(key, []).append(site)
    return [sorted(sites, key=lambda s: -s.units) for sites in alike.values()]


@dataclass
class _Bench:
    """Times the block of a site, or the run of blocks it spans, at chosen numbers of units."""

    site: Site
    """With paths from the module that `call` calls."""
    call: BlockCall
    device: torch.device
    repeats: int
    seconds: float
    times: dict[int, float] = field(default_factory=dict)
    """Units -> the block's time, as a share of the whole block's."""
    rank_times: dict[Shape, float] = field(default_factory=dict)
    """The same of heads of lower ranks."""
    noise: float = 0.0
    """Typical error of a share."""

    def run(self) -> None:
        """Time an even grid of sizes first, then closer wherever the curve bends; then lower ranks of heads."""
        finest = _FINEST.get(self.site.kind, _FINEST_OTHER)
        step = max(finest, math.ceil(self.site.units / _INTERVALS / finest) * finest)
        sizes = {*range(0, self.site.units, step), self.site.units}
        while sizes and len(self.times) + len(sizes) <= _MOST_SIZES:
            self.times |= {
                units: share for (units, _), share in self._measure([(n, 0) for n in sorted(sizes)]).items()
            }
            sizes = self._bends(finest)
        if self.site.ranks and self.site.width > _LEAST_STEP and self.site.units:
            heads = even(self.site.units, math.ceil(self.site.units / _HEADS))
            ranks = even(self.site.width, max(_LEAST_STEP, math.ceil(self.site.width / _RANKS)))
            # whole heads as well, so that drift hits all alike
            self.rank_times = self._measure([(0, 0), *itertools.product(heads, [*ranks[:-1], 0])])

    def curve(self, block_ms: float) -> Curve:
        """The curve of a `LatencyTable`; `block_ms` is what the whole block takes.

        Of a layer between two sites each has its share, as of the MACs; `select` multiplies what is left of both.
        """
        counts = sorted(self.times)
        block_ms *= self.site.own_share
        times = settled([self.times[n] for n in counts], 3 * self.noise)
        found: Curve = {
            "counts": counts,
            "ms": [(t - times[0]) * block_ms for t in times],
            "noise": self.noise * block_ms,
        }
        if self.rank_times:
            found["ranks"] = self._rank_times(found["ms"][-1])
        return found

    def _rank_times(self, whole: float) -> RankTimes:
        """The times of all (heads, rank), in proportion to the `whole` time of all heads."""
        times = dict(self.rank_times)
        none = times.pop((0, 0))
        heads, ranks = (sorted(set(sizes)) for sizes in zip(*times, strict=True))
        ranks = [*ranks[1:], 0]  # whole heads last
        shares = [settled([none, *(times[n, rank] for n in heads)], 3 * self.noise) for rank in ranks]
        columns = [settled(column, 3 * self.noise) for column in zip(*shares, strict=True)]
        grid = np.array(columns).T  # [ranks, 1 + heads]
        grid -= grid[:, :1]
        ms = grid * (whole / grid[-1, -1] if grid[-1, -1] > 0 else 0.0)
        return {"ranks": [*ranks[:-1], self.site.width], "counts": [0, *heads], "ms": ms.tolist()}

    def _bends(self, finest: int) -> set[int]:
        """Middles of the gaps beside sizes that are off the line through their neighbours."""
        counts = sorted(self.times)
        allowed = max(_BEND, 4 * self.noise)
        found = set()
        for low, middle, high in zip(counts, counts[1:], counts[2:], strict=False):
            share = (middle - low) / (high - low)
            line = self.times[low] + share * (self.times[high] - self.times[low])
            if abs(self.times[middle] - line) > allowed:
                found |= {(a + b) // 2 // finest * finest for a, b in ((low, middle), (middle, high))}
        return found - set(counts)

    def _measure(self, shapes: Sequence[Shape]) -> dict[Shape, float]:
        """Time shapes, each in every round beside the whole block, so that drift hits all alike: as shares of that."""
        block = self.call.on(self.call.module)
        calls = [block, *(self.call.on(self._sliced(*shape)) for shape in shapes)]
        rounds = _rounds(calls, self.device, self.repeats, self.seconds)  # [rounds, 1 + sizes]
        first, second, all_of_them = (_shares(part) for part in (rounds[::2], rounds[1::2], rounds))
        # two halves differ by about twice the error of the whole
        self.noise = max(self.noise, float(np.median(np.abs(first - second))) / 2)
        return {shape: float(share) for shape, share in zip(shapes, all_of_them, strict=True)}

    def _sliced(self, units: int, rank: int) -> nn.Module:
        """The block with the first `units` of the site, heads at a `rank`; what is not sliced shares the model's
        memory."""
        block = sharing_copy(self.call.module)
        site = replace(self.site, rank=rank)
        slice_model(block, Anatomy("", ("",), (site,)), {site.name: range(units)})
        return block


def even(most: int, step: int) -> list[int]:
    """The multiples of `step` below `most`, and `most`."""
    return [*range(step, most, step), most]


def settled(times: Sequence[float], noise: float) -> list[float]:
    """Average neighbours that fall by no more than `noise`, until none do: more units are not faster by chance.

    A larger fall stays: kernels may well be faster at a larger, rounder size.
    """
    pools: list[list[float]] = []  # [sum, count]
    for value in times:
        pools.append([value, 1.0])
        while len(pools) > 1 and 0 < pools[-2][0] / pools[-2][1] - pools[-1][0] / pools[-1][1] <= noise:
            total, count = pools.pop()
            pools[-1] = [pools[-1][0] + total, pools[-1][1] + count]
    return [total / count for total, count in pools for _ in range(int(count))]


def _whole(
    model: OpenModel,
    inputs: Mapping[str, Tensor],
    blocks: Sequence[BlockCall],
    repeats: int,
    seconds: float,
) -> tuple[float, list[float]]:
    """Median milliseconds of the whole model, and what each block takes of them."""
    calls = [lambda: model.run(inputs), *(block.on(block.module) for block in blocks)]
    rounds = _rounds(calls, model.device, repeats, seconds)
    total = float(np.median(rounds[:, 0]))
    return total, (_shares(rounds) * total).tolist()


def _shares(rounds: np.ndarray) -> np.ndarray:
    """Times of all calls but the first, as shares of the first one's: [rounds, calls] -> [calls - 1].

    By a low quantile: other work on the device makes calls longer, never shorter, and hits them unevenly.
    """
    quick = np.quantile(rounds, _QUANTILE, axis=0)
    return quick[1:] / quick[0]


def _rounds(calls: Sequence[Call], device: torch.device, repeats: int, seconds: float) -> np.ndarray:
    """Milliseconds of a call, [rounds, calls]; every round starts with another one."""
    for call in calls:
        for _ in range(_WARMUP):
            call_ms(call, device)
    often = max(1, math.ceil(_SHORTEST_MS / max(call_ms(calls[0], device), 1e-3)))
    rounds: list[list[float]] = []
    end = time.perf_counter() + seconds
    while len(rounds) < max(repeats, 2) or (len(rounds) < _MOST_ROUNDS and time.perf_counter() < end):
        row = [0.0] * len(calls)
        for step in range(len(calls)):
            index = (step + len(rounds)) % len(calls)
            row[index] = call_ms(_repeated(calls[index], often), device) / often
        rounds.append(row)
    return np.array(rounds)


def _repeated(call: Call, often: int) -> Call:
    def run() -> None:
        for _ in range(often):
            call()

    return run
