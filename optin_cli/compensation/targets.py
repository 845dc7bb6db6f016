"""Targets of compensation in a block: the layers behind the units, and those that make them.

The consumer of a site is to bring the residual stream back to the dense one. A producer reads another stream than the
dense one did: it is to give what the dense producer gave for the dense input, for the units that are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from optin_cli.architectures.paths import joined, within
from optin_cli.compensation.equations import Fitted
from optin_cli.compensation.residual import find_residual_sum
from optin_cli.compensation.write_back import kept_features, kept_outputs, layer_of
from optin_cli.execution.block_runs import OUTPUT, Place, order_of, run_block
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.structure.anatomy import SEQUENCE, Producer, Site
from optin_cli.structure.hidden_states import Arguments, as_rows, hidden_argument, with_hidden
from optin_cli.structure.layers import channel_axis, is_affine_norm, is_grouped, is_linear, matrix, shape_of
from optin_cli.transforms.slicing import rows_of, scale_factors

NO_RESIDUAL = "no residual found"
_POSITIONS = 64
"""That a block is looked at on, at least: it is told from noise that passes through it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Target(Fitted):
    """A layer that is refitted, and where in its block the models are compared."""

    site: Site
    into: Place
    """The tensor that the layer reads."""
    reads: str
    """Path of the first layer of the site that reads the same tensor: what both read is summed once."""
    place: Place
    """The tensor that is to be the same in the dense and the pruned model."""
    axis: int
    """The axis of the channels there, counted from the end."""
    batch_axis: int
    """The axis of the examples there."""
    kept: Tensor
    """Of the dense model's channels there, those that the layer has an output for."""
    factors: Tensor | None = None
    """[outputs]: what the layer is to give, in terms of what the dense one gives; None: the same. Queries of a lower
    rank make up for the scale of their logits."""
    order: Tensor | None = None
    """[positions]: which of an example's rows gets to each of its positions there; None for the same order."""
    residual: bool = False
    """A residual is added there, so that positions are in the order of the block's stream."""


class BlockTargets:
    """All that is refitted in one block. `arguments` are those of the teacher's block on one batch."""

    def __init__(
        self,
        model: OpenModel,
        teacher: OpenModel,
        pruned: nn.Module,
        keep: Mapping[str, list[int]],
        block: int,
        arguments: Arguments,
    ) -> None:
        self.model = model
        self.teacher = teacher
        self.pruned = pruned
        self.keep = keep
        self.block = block
        self.root = model.anatomy.blocks[block]
        self.module = teacher.module.get_submodule(self.root)
        self.arguments = of_few_examples(self.module, arguments, model.anatomy.stream_of(block).layout)
        """What it is called with: how it is built can be seen on a few examples."""
        self.sites = model.anatomy.in_block(block)

    # ---- consumers ----

    def consumers(self) -> dict[str, Target]:
        """Site -> its consumer, in the order they run; without those that don't run exactly once."""
        sites = {within(self.root, site.consumer): site for site in self.sites}
        order = order_of(self.module, list(sites), self.arguments)
        return {
            sites[path].name: self._consumer(sites[path], path) for path in order if order.count(path) == 1
        }

    def _consumer(self, site: Site, path: str) -> Target:
        layout = self.model.anatomy.stream_of(self.block).layout
        point = find_residual_sum(
            self.module, path, self.arguments, layout=layout, batch_axis=site.batch_axis
        )
        # where another site's units come out of the consumer, no stream is met behind it
        inner = self.model.anatomy.fed_by(site.consumer) is not None
        columns = matrix(layer_of(self.pruned, site.consumer)).shape[1]
        kept = kept_outputs(self.model.anatomy, site, self.keep, len(point.gain))
        taps = columns // max(1, len(kept_features(site, self.keep)))
        return Target(
            name=site.name,
            where=f"block {site.block}",
            site=site,
            path=site.consumer,
            into=Place(path, 0, 0),
            reads=path,
            place=point.place,
            axis=point.axis,
            batch_axis=point.batch_axis,
            kept=kept,
            gain=point.gain[kept.to(point.gain.device)],
            width=max(1, taps * site.kept_width),
            order=point.rows,
            residual=point.found,
            relative=True,
            norm=site.norm,
            note="" if point.found or inner else NO_RESIDUAL,
        )

    # ---- producers ----

    def producers(self) -> dict[str, list[Target]]:
        """Site -> its producers that can be refitted.

        Such a producer runs once in the block, on what comes from the block's own stream, makes units of one site
        alone and is not the consumer of a site: a consumer is refitted already.
        """
        candidates = {within(self.root, p.path): (site, p) for site in self.sites for p in site.producers}
        candidates = {path: found for path, found in candidates.items() if self._is_own(path, found[1].path)}
        ran = order_of(self.module, list(candidates), self.arguments)
        found: dict[str, list[Target]] = {}
        inputs = self._reading([path for path in candidates if ran.count(path) == 1])
        for path in inputs:
            site, producer = candidates[path]
            units = self._teachers_units(site)
            if units is not None and len(units):
                target, others = self._producer(site, producer, path, units), found.setdefault(site.name, [])
                same = (other for other in others if self._alike(other, target, inputs))
                others.append(replace(target, reads=next(same, target).reads))
        return found

    def _alike(self, one: Target, other: Target, inputs: Mapping[str, Tensor]) -> bool:
        """Whether the rows of two layers are the same."""
        linear = all(is_linear(self.module.get_submodule(path)) for path in (one.reads, other.reads))
        return linear and torch.equal(inputs[one.reads], inputs[other.reads])

    def _is_own(self, path: str, full: str) -> bool:
        anatomy = self.model.anatomy
        inside = bool(path) and joined(self.root, path) == full
        makes = sum(producer.path == full for site in anatomy for producer in site.producers)
        apart = makes == 1 and anatomy.read_by(full) is None
        return inside and apart and not is_grouped(self.model.module.get_submodule(full))

    def _producer(self, site: Site, producer: Producer, path: str, units: Tensor) -> Target:
        layer = layer_of(self.pruned, producer.path)
        outputs, columns = matrix(layer).shape
        target = Target(
            name=site.name,
            where=f"block {site.block}",
            site=site,
            path=producer.path,
            into=Place(path, 0, 0),
            reads=path,
            place=Place(path, 0, None),
            axis=channel_axis(layer),
            batch_axis=0 if isinstance(layer, nn.Conv2d) else site.batch_axis,
            kept=rows_of(self.teacher.anatomy[site.name], producer, units),
            factors=scale_factors(self.teacher.anatomy[site.name], producer, units),
            gain=torch.ones(outputs, dtype=torch.float64, device=self.model.device),
            width=max(1, columns // max(1, shape_of(layer, producer.path).inputs)),
        )
        return target if layer.bias is not None else replace(target, norm=self._norm_behind(target))

    def _norm_behind(self, target: Target) -> str:
        """Path of the BatchNorm that is given just what the layer gives; '' if there is none."""
        norms = [p for p in target.site.carried if is_affine_norm(self.model.module.get_submodule(p))]
        into = {path: Place(within(self.root, path), 0, 0) for path in norms}
        found = run_block(self.module, self.arguments, {target.place, *into.values()})
        return next((p for p, place in into.items() if torch.equal(found[place], found[target.place])), "")

    def _reading(self, paths: list[str]) -> dict[str, Tensor]:
        """Path -> input, where that changes with the block's hidden states: not of what reads another stream alone."""
        if not paths:
            return {}
        places = {path: Place(path, 0, 0) for path in paths}
        hidden = hidden_argument(*self.arguments)
        noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden)
        others = with_hidden(self.arguments, hidden + noise * (hidden.std() or 1))
        before, after = (
            run_block(self.module, given, set(places.values())) for given in (self.arguments, others)
        )
        return {
            path: before[place]
            for path, place in places.items()
            if not torch.equal(before[place], after[place])
        }

    def _teachers_units(self, site: Site) -> Tensor | None:
        """The kept units of a site as the teacher counts them; None if that is not recorded.

        A teacher that was pruned less, or not at all, has more units; the models' records say which.
        """
        kept = list(self.keep.get(site.name, range(site.units)))
        teachers = self.teacher.anatomy[site.name]
        if self.teacher is not self.model and (site.rank or site.width != teachers.width):
            return None  # its heads have other bases
        there = teachers.units
        if self.teacher is not self.model and there != site.units:
            if self.model.record is None:
                return None
            original = [self.model.record.kept[site.name][unit] for unit in kept]
            has = self.teacher.record.kept[site.name] if self.teacher.record else range(there)
            places = {unit: place for place, unit in enumerate(has)}
            if any(unit not in places for unit in original):
                return None
            kept = [places[unit] for unit in original]
        return torch.as_tensor(kept, dtype=torch.long)


def of_few_examples(block: nn.Module, arguments: Arguments, layout: str) -> Arguments:
    """The arguments of a block for the first examples of a batch, two or more; all of them where the block can't be
    called with less of the tensors that begin with as many rows as there are examples."""
    hidden = hidden_argument(*arguments)
    examples, positions = hidden.shape[0], as_rows(hidden, layout).shape[-2]
    few = max(2, -(-_POSITIONS // positions))
    if layout == SEQUENCE or examples <= few:
        return arguments

    def cut(value: Any) -> Any:
        if type(value) in (tuple, list):
            return type(value)(map(cut, value))
        batched = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == examples
        return value[:few] if batched else value

    args, kwargs = arguments
    found = tuple(map(cut, args)), {name: cut(value) for name, value in kwargs.items()}
    try:
        run_block(block, found, {OUTPUT})
    except (RuntimeError, IndexError, ValueError):  # a tensor was cut that has as many rows by chance
        return arguments
    return found
