"""Compensation without training: refit what is left, so that the pruned stream follows the dense one.

Block by block, and in a block the sites in the order they run. The target of a site is what the dense model has
where the consumer's output joins the residual; what there is to work with is the pruned model's own stream, all
earlier sites refitted. So a site makes up for what it lost itself and for what is still wrong before it
(docs/method.md, section 6). Before that its producers learn to read this stream: their targets are the units that
the dense model gives for its input. Last come the layers behind the blocks, each to give what the dense one gives. No
labels, no gradients.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from optin_cli.compensation.equations import Equations, left_alone, reason_against
from optin_cli.compensation.least_squares import NONE, Change
from optin_cli.compensation.read_positions import read_positions
from optin_cli.compensation.readout import Readout, not_by_example, readout_layers
from optin_cli.compensation.residual import by_example
from optin_cli.compensation.row_sampling import RowChoice
from optin_cli.compensation.settings import Compensation, Progress, SiteFit
from optin_cli.compensation.targets import NO_RESIDUAL, BlockTargets, Target
from optin_cli.compensation.write_back import layer_of, write_back, write_back_producers, write_back_whole
from optin_cli.data.batches import Batch, Batches
from optin_cli.errors import InputError, param
from optin_cli.execution.activation_cache import ActivationCache
from optin_cli.execution.block_runs import OUTPUT, Place
from optin_cli.execution.block_streams import read_streams
from optin_cli.execution.hooks import by_module
from optin_cli.execution.peak_memory import free_gpu_bytes
from optin_cli.execution.precision import exact_convolutions
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.structure.anatomy import Site
from optin_cli.structure.layers import like_weight, patches, replaces_forward
from optin_cli.transforms.slicing import sharing_copy, slice_model

log = logging.getLogger("optin")


def compensate(
    model: OpenModel,
    keep: Mapping[str, list[int]],
    batches: Batches,
    settings: Compensation,
    on_progress: Progress = lambda *_: None,
    teacher: OpenModel | None = None,
) -> list[SiteFit]:
    """Refit, in place, the consumers' columns of the units that `keep` lists, and the consumers' biases; and the rows
    that make those units.

    The dense stream is that of `teacher`: the model before it was pruned at all, where this is not the first time;
    by default the model itself. The model stays whole, and what belongs to units to be removed keeps its weights.
    New weights are rounded to the dtype they will be stored in. Raises `InputError` when activations are not finite,
    and for a model whose modules can't be copied.
    """
    if settings.method == NONE:
        return []
    if replaces_forward(model.module):
        raise InputError(
            f"{model.spec} has modules whose forward is replaced (spread over devices?): it can't be compensated",
            f"open it on one device, or leave the compensation out: {param('compensate', 'none')}",
        )
    pruned = _sliced_twin(model, keep)
    on_gpu = free_gpu_bytes(model.devices) // 2  # the other half is for what the blocks compute
    with torch.no_grad(), exact_convolutions(), ActivationCache(settings.memory, on_gpu) as store:
        streams = _Streams(model, pruned, keep, teacher or model, batches, settings, store, on_progress)
        fits = streams.run()
    for site in model.anatomy:
        write_back(model, site, keep, pruned)
        write_back_producers(model, site, keep, pruned)
    for path in streams.readout:
        write_back_whole(model, path, pruned)
    return fits


def _sliced_twin(model: OpenModel, keep: Mapping[str, list[int]]) -> nn.Module:
    """A sliced copy of the model that shares every tensor it does not change."""
    twin = sharing_copy(model.module)
    slice_model(twin, model.anatomy, keep)
    return twin


def _columns(values: Tensor, chosen: Tensor) -> Tensor:
    """Some of the last dimension: as columns of a matrix they are taken in a third of the time."""
    if torch.equal(chosen, torch.arange(values.shape[-1], device=chosen.device)):
        return values
    return values.flatten(0, -2).index_select(1, chosen).unflatten(0, values.shape[:-1])


def _tell_of_outputs(fits: Sequence[SiteFit]) -> None:
    """Warn once of consumers that are not fitted toward the stream: of Gemma those of every block."""
    alone = [fit.site for fit in fits if NO_RESIDUAL in fit.note]
    if alone:
        which = ", ".join(alone[:2]) + (f" and {len(alone) - 2} more" if len(alone) > 2 else "")
        log.warning("no sum with a residual behind %s: the target there is the layer's own output", which)


class _Streams:
    """The dense and the pruned stream on their way through the blocks."""

    def __init__(
        self,
        model: OpenModel,
        pruned: nn.Module,
        keep: Mapping[str, list[int]],
        teacher: OpenModel,
        batches: Batches,
        settings: Compensation,
        store: ActivationCache,
        on_progress: Progress,
    ) -> None:
        self.model = model
        self.pruned = pruned
        self.keep = keep
        self.teacher = teacher
        self.batches = batches
        self.settings = settings
        self.store = store
        self.on_progress = on_progress
        self.depth = len(model.anatomy.blocks)
        self.readout: list[str] = []
        """Layers behind the last block that are refitted."""
        if settings.readout:
            self.readout = readout_layers(teacher, batches[0].to(model.device, model.dtype))
        fitted = 2 if settings.producers else 1
        behind = 2 + len(self.readout) if self.readout else 0
        self.steps = len(batches) * (2 * self.depth + fitted * len(model.anatomy.sites) + behind)
        self.done = 0
        self.rows = RowChoice(model, batches, settings)
        self.dense, self.ours = read_streams(model, pruned, teacher, batches, store, self._read)

    def _read(self, index: int, batch: Batch) -> None:
        if index in (0, len(self.batches) - 1):
            found = read_positions(self.teacher, batch)
            # where texts of another length are read elsewhere (a decoder's last token), no position is the read one
            self.rows.read = found if index == 0 or found == self.rows.read else None
        self.rows.add(batch)
        self._step("reading the data")

    def run(self) -> list[SiteFit]:
        """Fit every site; returns what was done at each layer, in the order of the network."""
        fits = []
        for uses in by_module(self.model.module, self.model.anatomy.blocks).values():
            consumers, producers = self._targets(uses[0])
            self._dense_pass(uses, [*consumers.values(), *chain(*producers.values())])
            for site in self._ordered(uses[0], consumers):
                fits += self._fit(producers.get(site.name, ()), uses)
                if site.name in consumers:
                    fits += self._fit([consumers[site.name]], uses)
                else:
                    fits.append(
                        left_alone(site.name, site.consumer, "its consumer does not run exactly once")
                    )
            if uses[-1] + 1 < self.depth or self.readout:
                self._pruned_pass(uses)
        _tell_of_outputs(fits)
        return fits + (self._fit_readout() if self.readout else [])

    def _fit_readout(self) -> list[SiteFit]:
        """Fit what stands behind the last block, layer after layer: the next one reads what this one gives."""
        readout = Readout(
            self.model, self.pruned, self.teacher, self.readout, self.batches, self.rows, self.store
        )
        for index in range(len(self.batches)):
            readout.read_dense(index, self.dense)
            self._step("behind the last block, dense")
        fitted = readout.by_example()
        fits = [not_by_example(path) for path in self.readout if path not in fitted]
        self.done += len(self.batches) * len(fits)
        for path in fitted:
            equations = readout.equations(path, self.settings)
            for index in range(len(self.batches)):
                readout.gather(equations, index, self.ours)
                self._step(path)
            fits += self._solved(equations)
        return fits

    def _solved(self, equations: Equations[Any]) -> list[SiteFit]:
        """Change layers by what their equations say."""
        found = equations.solve()
        for layer, target, (change, _) in zip(equations.layers, equations.targets, found, strict=True):
            self._change(layer, change, target.norm)
        return [fit for _, fit in found]

    def _targets(self, block: int) -> tuple[dict[str, Target], dict[str, list[Target]]]:
        """(consumers in the order they run, producers) of a block's sites."""
        sites = self.model.anatomy.in_block(block)
        if not sites:
            return {}, {}
        arguments = self.dense.arguments(block, 0)
        found = BlockTargets(self.model, self.teacher, self.pruned, self.keep, block, arguments)
        consumers = found.consumers()
        producers = found.producers() if self.settings.producers else {}
        passes = len(sites) * (1 + self.settings.producers)
        self.done += len(self.batches) * (passes - len(consumers) - len(producers))
        return consumers, producers

    def _ordered(self, block: int, consumers: Mapping[str, Target]) -> list[Site]:
        """The sites of a block as they run; then those that can't be fitted."""
        order, sites = list(consumers), self.model.anatomy.in_block(block)
        return sorted(sites, key=lambda site: order.index(site.name) if site.name in order else len(order))

    # ---- passes over all batches ----

    def _dense_pass(self, uses: Sequence[int], targets: Sequence[Target]) -> None:
        """Bring the dense stream behind the blocks that share a module, and keep what their targets compare with."""
        places = {target.place for target in targets} | {OUTPUT}
        for block in uses:
            for index in range(len(self.batches)):
                found = self.dense.run(block, index, places)
                for target in targets:
                    there = self._by_example(found[target.place], index, target.axis, target.batch_axis)
                    there = _columns(there, target.kept.to(there.device))
                    if target.factors is not None:
                        there = there * target.factors.to(there)
                    self.store[target.path, block, index] = self.rows.drawn(there, target.name, index)
                self.dense.advance(block, index, found[OUTPUT])
                self._step(f"block {block}, dense")

    def _pruned_pass(self, uses: Sequence[int]) -> None:
        for block in uses:
            for index in range(len(self.batches)):
                self.ours.advance(block, index)
                self._step(f"block {block}, pruned")

    def _fit(self, targets: Sequence[Target], uses: Sequence[int]) -> list[SiteFit]:
        """Gather the equations of layers of one site from the pruned stream in one pass, solve them and change the
        layers: none of them reads what another one gives.

        Where blocks share them, the equations of all are solved together: those of deeper ones on the stream before
        the change.
        """
        fits: list[SiteFit] = []
        groups: dict[str, list[Target]] = {}
        for target in targets:
            if reason := reason_against(layer_of(self.pruned, target.path)):
                fits.append(left_alone(target.name, target.path, reason))
            else:
                groups.setdefault(target.reads, []).append(target)
        if not groups:
            self.done += len(self.batches) * bool(targets)
            return fits
        equations = [self._equations(group) for group in groups.values()]
        places = {place for group in groups.values() for place in (group[0].into, *(t.place for t in group))}
        for index in range(len(self.batches)):
            start = self.ours.place(index) if len(uses) > 1 else None
            for block in uses:
                found = self.ours.run(block, index, places, stop=True)
                for gathered in equations:
                    self._gather(gathered, found, block, index)
                if block != uses[-1]:
                    self.ours.advance(block, index)
            if len(uses) > 1:
                self.ours.begin(index, start)
            self._step(targets[0].name)
        return fits + [fit for gathered in equations for fit in self._solved(gathered)]

    def _equations(self, targets: Sequence[Target]) -> Equations[Target]:
        """Those of layers that read the same tensor, still empty."""
        layers = [layer_of(self.pruned, target.path) for target in targets]
        return Equations(layers, targets, self.model.device, self.settings)

    # ---- one batch ----

    def _gather(
        self, equations: Equations[Target], found: Mapping[Place, Tensor], block: int, index: int
    ) -> None:
        """Add what layers read on a batch, and what their outputs lack."""
        first, dtype = equations.targets[0], equations.dtype
        errors, dense = [], []
        for target in equations.targets:
            own = self._by_example(found[target.place].to(dtype), index, target.axis, target.batch_axis)
            drawn = self.rows.drawn(own, target.name, index)
            dense.append(self.store.pop((target.path, block, index)).to(own))
            # a closed channel lacks nothing
            gain = target.gain
            inverse = torch.where(gain.abs() > 1e-6 * gain.abs().max(), 1 / gain, 0.0)
            errors.append((dense[-1] - drawn) * inverse.to(dtype))
        x = self._by_example(
            patches(equations.layers[0], found[first.into]), index, -1, first.site.batch_axis
        )
        if first.order is not None:
            x = x[:, first.order.to(x.device)]
        # else these are rows of windows, or a few of many
        alone = found[first.place].shape[first.batch_axis] == len(x)
        in_order = drawn is own and (first.residual or alone)
        weight = self.rows.weights(block, index, errors[0][..., 0], in_order)
        held = self.rows.held_out(index, like=weight)
        equations.add(self.rows.drawn(x, first.name, index), errors, weight, dense, held)

    def _change(self, layer: nn.Module, change: Change, behind: str = "") -> None:
        """Add to a layer of the pruned twin, and to the norm `behind` it what a bias would be."""
        if change.method == NONE:
            return
        self._add(layer, "weight", like_weight(layer, change.weight))
        if layer.bias is not None:
            self._add(layer, "bias", change.bias)
        elif behind:
            norm = self.pruned.get_submodule(behind)
            assert isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None
            gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            self._add(norm, "bias", gain * change.bias)

    def _add(self, module: nn.Module, name: str, step: Tensor) -> None:
        """Change a parameter, rounded to what will be stored; its old tensor may be shared."""
        old = getattr(module, name).data
        new = (old.double() + step).to(self.model.stored_dtype).to(old.dtype)
        setattr(module, name, nn.Parameter(new, requires_grad=False))

    # ---- plumbing ----

    def _by_example(self, tensor: Tensor, index: int, axis: int, batch_axis: int) -> Tensor:
        return by_example(tensor, len(self.batches.ids(index)), axis, batch_axis)

    def _step(self, what: str) -> None:
        self.done += 1
        self.on_progress(self.done, self.steps, what)
