"""Compensation without training: refit what is left, so that the pruned stream follows the dense one.

Block by block, and in a block the sites in the order they run. The target of a site is what the dense model has
where the consumer's output joins the residual; what there is to work with is the pruned model's own stream, all
earlier sites refitted. So a site makes up for what it lost itself and for what is still wrong before it
(METHOD section 6). Before that its producers learn to read this stream: their targets are the units that the dense
model makes of its own. No labels, no gradients.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from optin_cli.data.batches import Batch, Batches
from optin_cli.errors import InputError
from optin_cli.models.anatomy import Site
from optin_cli.models.checkpoint import OpenModel
from optin_cli.models.layers import like_weight, matrix, patches, shape_of
from optin_cli.models.placing import within
from optin_cli.models.slicing import slice_model
from optin_cli.models.uses import by_module
from optin_cli.surgery.consumers import (
    kept_features,
    kept_outputs,
    layer_of,
    write_back,
    write_back_producers,
)
from optin_cli.surgery.equations import Equations, left_alone, reason_against
from optin_cli.surgery.producers import Made, find_producers
from optin_cli.surgery.readout import read_positions
from optin_cli.surgery.refit import NONE, Change, Consumer
from optin_cli.surgery.rows import RowChoice
from optin_cli.surgery.settings import Compensation, Progress, SiteFit
from optin_cli.surgery.store import Store
from optin_cli.surgery.streams import read_streams
from optin_cli.surgery.sumpoint import (
    OUTPUT,
    Place,
    SumPoint,
    by_example,
    find_sum_point,
    order_of,
)

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
    if any("forward" in vars(module) for module in model.module.modules()):
        raise InputError(  # a copy of such a module would run the original
            f"{model.spec} has modules whose forward is replaced (spread over devices?): it can't be compensated",
            "open it on one device, or leave the compensation out: --compensate none",
        )
    pruned = _sliced_twin(model, keep)
    with torch.no_grad(), Store(settings.memory) as store:
        fits = _Streams(model, pruned, keep, teacher or model, batches, settings, store, on_progress).run()
    for site in model.anatomy:
        write_back(model, site, keep, pruned)
        write_back_producers(model, site, keep, pruned)
    return fits


def _sliced_twin(model: OpenModel, keep: Mapping[str, list[int]]) -> nn.Module:
    """A sliced copy of the model that shares every tensor it does not change."""
    tensors = (*model.module.parameters(), *model.module.buffers())
    twin = copy.deepcopy(model.module, {id(tensor): tensor for tensor in tensors})
    slice_model(twin, model.anatomy, keep)
    return twin


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
        store: Store,
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
        fitted = 2 if settings.producers else 1
        self.steps = len(batches) * (2 * self.depth + fitted * len(model.anatomy.sites))
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
        """Fit every site; returns what was done at each, in the order of the network."""
        fits = []
        for uses in by_module(self.model.module, self.model.anatomy.blocks).values():
            points, producers = self._sum_points(uses[0]), self._producers(uses[0])
            self._dense_pass(uses, points, producers)
            for site in self._ordered(uses[0], points):
                if site.name in producers:
                    fits += self._fit_producers(site, producers[site.name], uses)
                fits.append(self._fit(site, points.get(site.name), uses))
            if uses[-1] + 1 < self.depth:
                self._pruned_pass(uses)
        return fits

    # ---- passes over all batches ----

    def _sum_points(self, block: int) -> dict[str, SumPoint]:
        """Where each site of a block meets the residual, in the order the sites run."""
        if not self.model.anatomy.in_block(block):
            return {}
        module, arguments = self._block(block), self.dense.arguments(block, 0)
        layout = self.model.anatomy.stream_of(block).layout
        sites = {self._within(site): site for site in self.model.anatomy.in_block(block)}
        order = order_of(module, list(sites), arguments)
        points = {
            sites[path].name: find_sum_point(
                module, path, arguments, layout=layout, batch_axis=sites[path].batch_axis
            )
            for path in order
            if order.count(path) == 1
        }
        for name, point in points.items():
            if not point.found and not self._is_inner(self.model.anatomy[name]):
                log.warning("%s: no sum with a residual found; its own output is the target", name)
        return points

    def _is_inner(self, site: Site) -> bool:
        """Whether another site's units come out of the consumer: then no stream is met behind it."""
        return self.model.anatomy.fed_by(site.consumer) is not None

    def _ordered(self, block: int, points: dict[str, SumPoint]) -> list[Site]:
        """The sites of a block as they run; then those that can't be fitted."""
        sites = self.model.anatomy.in_block(block)
        return sorted(sites, key=lambda s: list(points).index(s.name) if s.name in points else len(points))

    def _producers(self, block: int) -> dict[str, list[Made]]:
        """What makes the units of each site of a block, where that is to be refitted."""
        sites = self.model.anatomy.in_block(block)
        if not sites or not self.settings.producers:
            return {}
        found = find_producers(self.model, self.teacher, self.keep, block, self.dense.arguments(block, 0))
        self.done += len(self.batches) * (len(sites) - len(found))
        return found

    def _dense_pass(
        self, uses: Sequence[int], points: dict[str, SumPoint], producers: dict[str, list[Made]]
    ) -> None:
        """Bring the dense stream behind the blocks that share a module, and keep what sites are fitted to: what it has
        at their sum points, and what it makes of their units."""
        made_here = [made for group in producers.values() for made in group]
        places = {point.place for point in points.values()} | {made.output for made in made_here}
        for block in uses:
            for index in range(len(self.batches)):
                found = self.dense.run(block, index, {*places, OUTPUT})
                for name, point in points.items():
                    rows = self._by_example(found[point.place], index, point.axis, point.batch_axis)
                    self.store[name, block, index] = self.rows.drawn(rows, name, index)
                for made in made_here:
                    rows = self._made(made, found[made.output], index, made.rows)
                    self.store[made.path, block, index] = rows
                self.dense.advance(block, index, found[OUTPUT])
                self._step(f"block {block}, dense")

    def _pruned_pass(self, uses: Sequence[int]) -> None:
        for block in uses:
            for index in range(len(self.batches)):
                self.ours.advance(block, index)
                self._step(f"block {block}, pruned")

    def _fit(self, site: Site, point: SumPoint | None, uses: Sequence[int]) -> SiteFit:
        """Gather a site's equations from the pruned stream, solve them and change its consumer.

        Where blocks share it, the equations of all are solved together: those of deeper ones on the stream that the
        consumer gives before its change.
        """
        if point is None:
            self.done += len(self.batches)
            return left_alone(site.name, site.consumer, "its consumer does not run exactly once")
        layer = layer_of(self.pruned, site.consumer)
        note = reason_against(layer)
        if note:
            self.done += len(self.batches)
            return left_alone(site.name, site.consumer, f"its consumer: {note}")
        equations = Equations(layer, self.model.device)
        weight_matrix = matrix(layer).data
        outputs, columns = weight_matrix.shape
        kept = kept_outputs(self.model.anatomy, site, self.keep, outputs)
        for index, block in self._walk(uses, site.name):
            x, error, weight, spread = self._rows(site, point, kept, index, block)
            equations.add(x, error, weight, spread, self.rows.held_out(index, like=weight))
        has_bias = layer.bias is not None or bool(site.norm)
        # an input has several taps
        width = columns // max(1, len(kept_features(site, self.keep))) * site.width
        consumer = Consumer(weight_matrix, has_bias, point.gain[kept.to(point.gain.device)], max(1, width))
        found = equations.solve(consumer, self.settings, site.block)
        self._change(layer, found.change, site.norm)
        note = "" if point.found or self._is_inner(site) else "no residual found"
        return equations.told(site.name, site.consumer, found, note)

    def _fit_producers(self, site: Site, producers: Sequence[Made], uses: Sequence[int]) -> list[SiteFit]:
        """Refit the layers that make a site's units. They read the same stream, so one pass serves all of them."""
        layers = {made: layer_of(self.pruned, made.path) for made in producers}
        reasons = {made: reason_against(layer) for made, layer in layers.items()}
        fits = [left_alone(site.name, made.path, reason) for made, reason in reasons.items() if reason]
        equations = {
            made: Equations(layers[made], self.model.device) for made, reason in reasons.items() if not reason
        }
        if not equations:
            self.done += len(self.batches)
            return fits
        places = {place for made in equations for place in (made.input, made.output)}
        for index, block in self._walk(uses, f"{site.name}, producers"):
            found = self.ours.run(block, index, places, stop=True)
            for made, sums in equations.items():
                dense = self.store.pop((made.path, block, index)).to(self.model.device).double()
                error = dense - self._made(made, found[made.output], index).double()
                taken = patches(layers[made], found[made.input])
                x = self.rows.drawn(self._by_example(taken, index, -1, made.batch_axis), site.name, index)
                alone = found[made.output].shape[made.batch_axis] == len(
                    error
                )  # else these are rows of windows
                weight = self.rows.weights(
                    block, index, error[..., 0], alone and x.shape[1] == taken.shape[1]
                )
                sums.add(x, error, weight, dense.square().sum(-1), self.rows.held_out(index, like=weight))
        for made, sums in equations.items():
            layer = layers[made]
            weight_matrix = matrix(layer).data
            gain = weight_matrix.new_ones(len(weight_matrix), dtype=torch.float64)
            taps = weight_matrix.shape[1] // max(1, shape_of(layer, made.path).inputs)
            consumer = Consumer(weight_matrix, layer.bias is not None or bool(made.norm), gain, max(1, taps))
            solved = sums.solve(consumer, self.settings, site.block)
            self._change(layer, solved.change, made.norm)
            fits.append(sums.told(site.name, made.path, solved, ""))
        return fits

    def _walk(self, uses: Sequence[int], what: str) -> Iterator[tuple[int, int]]:
        """(batch, block) for all batches, and in each for the blocks that share a module, the pruned stream brought
        there. Equations of all are solved together: those of deeper ones on the stream before the change."""
        for index in range(len(self.batches)):
            start = self.ours.place(index) if len(uses) > 1 else None
            for block in uses:
                yield index, block
                if block != uses[-1]:
                    self.ours.advance(block, index)
            if len(uses) > 1:
                self.ours.begin(index, start)
            self._step(what)

    # ---- one batch ----

    def _rows(
        self, site: Site, point: SumPoint, kept: Tensor, index: int, block: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(x, what the `kept` outputs lack, weight, dense variance) of a batch in a block: [examples, positions, ...].

        The error counts relative to the token's own spread, as the norms that read the stream see it.
        """
        into = Place(self._within(site), 0, 0)
        found = self.ours.run(block, index, {into, point.place}, stop=True)
        dense = self.store.pop((site.name, block, index)).to(self.model.device).double()[..., kept]
        own = self._by_example(found[point.place].double(), index, point.axis, point.batch_axis)
        taken = patches(layer_of(self.pruned, site.consumer), found[into])
        x = self._by_example(taken, index, -1, site.batch_axis)
        if point.rows is not None:
            x = x[:, point.rows.to(x.device)]
        drawn = self.rows.drawn(own, site.name, index)
        gain = point.gain[kept.to(point.gain.device)]
        inverse = torch.where(
            gain.abs() > 1e-6 * gain.abs().max(), 1 / gain, 0.0
        )  # a closed channel lacks nothing
        error = (dense - drawn) * inverse
        variance = dense.var(-1, correction=0)  # (examples, positions)
        # else these are rows of windows, or a few of many
        alone = found[point.place].shape[point.batch_axis] == len(own)
        in_order = drawn is own and (point.found or alone)
        weight = self.rows.weights(block, index, variance, in_order)
        floor = 1e-6 * float(variance[weight > 0].mean()) or 1.0
        weight = weight / variance.clamp(min=floor)
        return self.rows.drawn(x, site.name, index), error, weight, variance * dense.shape[-1]

    def _made(self, made: Made, output: Tensor, index: int, rows: Tensor | None = None) -> Tensor:
        """What a producer gives on a batch, [examples, positions, outputs], of all outputs or of `rows`."""
        found = self._by_example(output, index, made.axis, made.batch_axis)
        found = found if rows is None else found[..., rows.to(found.device)]
        return self.rows.drawn(found, made.site.name, index)

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

    def _block(self, block: int) -> nn.Module:
        return self.teacher.module.get_submodule(self.model.anatomy.blocks[block])

    def _by_example(self, tensor: Tensor, index: int, axis: int, batch_axis: int) -> Tensor:
        return by_example(tensor, len(self.batches.ids(index)), axis, batch_axis)

    def _within(self, site: Site) -> str:
        """Path of a site's consumer within its block."""
        return within(self.model.anatomy.blocks[site.block], site.consumer)

    def _step(self, what: str) -> None:
        self.done += 1
        self.on_progress(self.done, self.steps, what)
