"""Put tables together to a family and try it on the whole model: outputs, costs, and what `dissect` makes of it."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from optin_cli.architectures.positions import weightless
from optin_cli.architectures.resolve import dissect
from optin_cli.architectures.schema import Family
from optin_cli.errors import InputError, OptinError
from optin_cli.execution.macs import MacCounter
from optin_cli.structure.anatomy import TOKENS, Anatomy, Site
from optin_cli.structure.hidden_states import as_rows
from optin_cli.tracing.blocks import Blocks
from optin_cli.tracing.record import RUN_ERRORS, Run, brief, forward, tensors_of
from optin_cli.tracing.sites import LeftOut
from optin_cli.tracing.tables import TableMatch, named
from optin_cli.tracing.verify import same
from optin_cli.transforms.masking import masked, masks_from_keep
from optin_cli.transforms.slicing import sharing_copy, slice_model

_CLOSE = 0.02  # MACs that are counted may differ so much from those that the table predicts
_EQUAL = 1e-4  # and so much for all sites together, where errors of some might make up for those of others
_FAR = 2  # times as many is another operation than the table knows


@dataclass(frozen=True)
class TraceResult:
    """A family that holds on the whole model."""

    family: Family
    anatomy: Anatomy
    fitted: tuple[TableMatch, ...]
    left: tuple[LeftOut, ...]
    notes: Mapping[str, str]
    """Consumer of a table -> what to know of it."""
    positions: int
    """Tokens (or positions) that the first block gives."""


class WholeModel:
    """The model that is traced, and its inputs."""

    def __init__(self, module: nn.Module, inputs: Mapping[str, Any], run: Run, blocks: Blocks) -> None:
        self.module = module
        self.inputs = dict(inputs)
        self.blocks = blocks
        self._dense_macs: dict[str, float] = {}
        self._run = run
        call = run.once(blocks.paths[0])
        assert call is not None and call.gave is not None
        self.batch = call.gave.shape[0]
        self.positions = as_rows(call.gave, blocks.layout).shape[1]

    @torch.no_grad()
    def is_chained(self) -> bool:
        """Return whether each block changes what follows the next one through that one alone. If not, a later block or
        the head reads what several blocks give."""
        gave: dict[str, Tensor] = {}

        def forwarded(changes: dict[str, Callable[[Tensor], Tensor]]) -> list[Tensor]:
            with ExitStack() as stack:
                for path, change in changes.items():
                    hook = _on_hidden(change)
                    stack.callback(self.module.get_submodule(path).register_forward_hook(hook).remove)
                return tensors_of(forward(self.module, self.inputs))

        def remembered(path: str) -> Callable[[Tensor], Tensor]:
            return lambda hidden: gave.setdefault(path, hidden.clone()).clone()

        def restored(path: str) -> Callable[[Tensor], Tensor]:
            return lambda _: gave[path].clone()

        dense = self._recorded(gave)
        if dense is None:
            dense = forwarded({path: remembered(path) for path in self.blocks.paths})
        pairs = list(pairwise(self.blocks.paths))
        return all(  # pairs that share no block in one pass: behind each of them everything is as it was
            same(
                forwarded(
                    {before: lambda hidden: hidden.roll(1, 0) for before, _ in apart}
                    | {after: restored(after) for _, after in apart}
                ),
                dense,
            )
            for apart in (pairs[::2], pairs[1::2])
            if apart
        )

    def _recorded(self, gave: dict[str, Tensor]) -> list[Tensor] | None:
        """The output of the recorded run; `gave` gets what each block gave. None where something has changed that in
        place since."""
        for path in self.blocks.paths:
            call = self._run.once(path)
            if call is None or not call.is_intact():
                return None
            assert call.gave is not None
            gave[path] = call.gave
        return tensors_of(self._run.output)

    def check(self, family: Family, fitted: Sequence[TableMatch]) -> TraceResult:
        """The family with those of the tables that hold, its costs counted in the way that holds for most.

        Raises `InputError` when none does.
        """
        ways = [True] if family.layout != TOKENS else [False, True] if family.modality == "image" else [False]
        tried: list[TraceResult] = []
        for way in ways:
            tried.append(self._check(replace(family, hierarchical=way), fitted))
            if len(tried[-1].fitted) == len(fitted) and not any(tried[-1].notes.values()):
                break
        best = max(tried, key=lambda checked: (len(checked.fitted), -sum(map(bool, checked.notes.values()))))
        if not best.fitted:
            raise InputError(
                f"nothing that was found in {type(self.module).__name__} holds on the whole model: "
                + "; ".join(f"{gone.where}: {gone.why}" for gone in best.left)
            )
        return best

    def _check(self, family: Family, fitted: Sequence[TableMatch]) -> TraceResult:
        groups: dict[str, list[TableMatch]] = {}
        for one in fitted:
            groups.setdefault(one.table.label, []).append(one)
        if result := self._check_together(family, fitted, list(groups.values())):
            return result
        kept: list[TableMatch] = []
        left: list[LeftOut] = []
        notes: dict[str, str] = {}
        for group in groups.values():
            consumer = group[0].table.consumer
            try:
                anatomy = dissect(self.module, _with_tables(family, group))
                self._compare(anatomy)
                notes[consumer] = self._cost(anatomy)
                kept += group
            except (OptinError, ValueError) as error:
                left.append(LeftOut(consumer, getattr(error, "what", str(error))))
        kept = named(kept)
        while kept:
            whole = _with_tables(family, kept)
            try:
                anatomy = dissect(self.module, whole)
                self._compare(anatomy)
                return TraceResult(whole, anatomy, tuple(kept), tuple(left), notes, self.positions)
            except (OptinError, ValueError) as error:
                gone = kept.pop()
                left.append(
                    LeftOut(gone.table.consumer, f"with the other sites: {getattr(error, 'what', error)}")
                )
        return TraceResult(family, Anatomy(family.name, (), ()), (), tuple(left), {}, self.positions)

    def _check_together(
        self, family: Family, fitted: Sequence[TableMatch], groups: Sequence[Sequence[TableMatch]]
    ) -> TraceResult | None:
        """The result where all tables hold, in one comparison; None where one does not."""
        tables = named(list(fitted))
        whole = _with_tables(family, tables)
        try:
            anatomy = dissect(self.module, whole)
            self._compare(anatomy)
            if self._costs_add_up(anatomy):
                notes = {group[0].table.consumer: "" for group in groups}
            else:
                notes = {
                    group[0].table.consumer: self._cost(dissect(self.module, _with_tables(family, group)))
                    for group in groups
                }
        except (OptinError, ValueError):
            return None
        return TraceResult(whole, anatomy, tuple(tables), (), notes, self.positions)

    def _costs_add_up(self, anatomy: Anatomy) -> bool:
        """Return whether slicing units of all sites saves what is counted for them, so that no site need be looked at
        alone: models may have dozens of tables."""
        keep = _half(anatomy)
        kept = {name: len(units) for name, units in keep.items()}
        predicted = anatomy.macs(self.positions) - anatomy.macs(self.positions, kept)
        return abs(self._saved(anatomy, keep) - predicted) <= _EQUAL * predicted

    def _cost(self, anatomy: Anatomy) -> str:
        """Slice units out of the whole model; returns what to know of their cost. Raises ValueError if it differs from
        what is counted for them."""
        keep = _half(anatomy)
        kept = {name: len(units) for name, units in keep.items()}
        saved = self._saved(anatomy, keep)
        predicted = anatomy.macs(self.positions) - anatomy.macs(self.positions, kept)
        if predicted > saved * (1 + _CLOSE) or saved > predicted * _FAR:
            share = 1 - sum(kept.values()) / sum(site.units for site in anatomy)
            raise ValueError(
                f"its MACs don't follow from a table: without {100 * share:.0f} % of its units the model saves "
                f"{saved:.0f} for an example, and {predicted:.0f} are counted"
            )
        shared = any(_shares(anatomy, site) for site in anatomy)
        if saved > predicted * (1 + _CLOSE) and not shared and predicted:
            return f"saves {saved / predicted:.2f} x the MACs that are counted for it"
        return ""

    def _compare(self, anatomy: Anatomy) -> None:
        """Slice about half of all units away. Raises ValueError if that differs from the masked model."""
        keep = _half(anatomy)
        smaller = sharing_copy(self.module)
        try:
            slice_model(smaller, anatomy, keep)
            # untrained models may blow rounding up by orders of magnitude: float64 decides
            agree = self._agree(anatomy, keep, smaller) or self._agree(anatomy, keep, smaller, torch.float64)
        except RUN_ERRORS as error:
            raise ValueError(f"the sliced model does not run: {brief(error)}") from error
        if not agree:
            raise ValueError("the sliced model does not compute what the masked one does")

    @torch.no_grad()
    def _agree(
        self,
        anatomy: Anatomy,
        keep: Mapping[str, list[int]],
        smaller: nn.Module,
        dtype: torch.dtype | None = None,
    ) -> bool:
        """Return whether the sliced model computes what the masked one does, in the model's `dtype` or another."""
        whole, inputs = self.module, self.inputs
        if dtype:
            whole, smaller = copy.deepcopy(whole).to(dtype), copy.deepcopy(smaller).to(dtype)
            inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        with masked(whole, anatomy, masks_from_keep(anatomy, keep)):
            expected = tensors_of(forward(whole, inputs))
        return same(tensors_of(forward(smaller, inputs)), expected)

    def _saved(self, anatomy: Anatomy, keep: Mapping[str, list[int]]) -> float:
        """MACs of an example that slicing saves, counted without weights; with them where a model looks at numbers."""
        for twin, device in ((weightless, "meta"), (sharing_copy, "cpu")):
            smaller = twin(self.module)
            slice_model(smaller, anatomy, keep)
            try:
                if device not in self._dense_macs:
                    self._dense_macs[device] = self._macs(twin(self.module), device)
                return self._dense_macs[device] - self._macs(smaller, device)
            except (*RUN_ERRORS, NotImplementedError) as error:
                if device == "cpu":
                    raise ValueError(f"the sliced model does not run: {brief(error)}") from error
        raise AssertionError

    def _macs(self, module: nn.Module, device: str) -> float:
        """MACs of an example, counted as it runs."""
        inputs = {name: value.to(device) for name, value in self.inputs.items()}
        with torch.no_grad(), MacCounter() as counter:
            forward(module, inputs)
        return counter.total / self.batch


def _with_tables(family: Family, fitted: Sequence[TableMatch]) -> Family:
    return replace(family, sites=tuple(one.table for one in fitted))


def _half(anatomy: Anatomy) -> dict[str, list[int]]:
    """About half of the units of each site, at least one."""
    draw = random.Random(0)
    return {s.name: sorted(draw.sample(range(s.units), max(1, s.units // 2))) for s in anatomy}


def _on_hidden(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """A forward hook that changes the hidden states, which may be first in a tuple."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    return hook


def _shares(anatomy: Anatomy, site: Site) -> bool:
    """Return whether a layer is between this site and another: each then has half of its cost."""
    ends: list[str] = [p.path for p in site.producers]
    return any(other.consumer in ends for other in anatomy.in_block(site.block))
