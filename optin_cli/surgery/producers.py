"""The layers that make a site's units, as compensation sees them: which can be refitted, and toward what.

A pruned model's producers read another stream than the dense one's did. Refitted, they make of it what the dense
producers made of theirs, for the units that are kept: the same least squares as for a consumer, with the dense
layer's own output as target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from optin_cli.models.anatomy import Producer, Site
from optin_cli.models.checkpoint import OpenModel
from optin_cli.models.hidden import Arguments, hidden_argument, with_hidden
from optin_cli.models.layers import channel_axis, is_affine_norm, is_grouped
from optin_cli.models.placing import joined, within
from optin_cli.models.slicing import rows_of
from optin_cli.surgery.consumers import layer_of
from optin_cli.surgery.sumpoint import Place, order_of, run_block


@dataclass(frozen=True)
class Made:
    """A producer that can be refitted, in its block."""

    site: Site
    producer: Producer
    input: Place
    output: Place
    rows: Tensor
    """Of the dense layer's outputs, those that the pruned layer has too."""
    axis: int
    """Where the channels stand in its output, counted from the end."""
    batch_axis: int
    norm: str = ""
    """The BatchNorm right behind, whose bias stands for the one the producer lacks."""

    @property
    def path(self) -> str:
        return self.producer.path


def find_producers(
    model: OpenModel,
    teacher: OpenModel,
    keep: Mapping[str, list[int]],
    block: int,
    arguments: Arguments,
) -> dict[str, list[Made]]:
    """The producers of each site of a block that can be refitted, site name -> producers.

    Such a producer runs once in the block, on what comes from the block's own stream, makes units of one site alone and
    is no site's consumer: as one it is refitted already. `arguments` are those of the teacher's block on one batch.
    """
    anatomy = model.anatomy
    root = anatomy.blocks[block]
    module = teacher.module.get_submodule(root)
    candidates: dict[str, tuple[Site, Producer]] = {}
    for site in anatomy.in_block(block):
        for producer in site.producers:
            path = within(root, producer.path)
            inside = path and joined(root, path) == producer.path
            consumes = any(other.consumer == producer.path for other in anatomy)
            makes = sum(other.path == producer.path for s in anatomy for other in s.producers)
            grouped = is_grouped(model.module.get_submodule(producer.path))
            if inside and not consumes and makes == 1 and not grouped:
                candidates[path] = site, producer
    ran = order_of(module, list(candidates), arguments)
    once = [path for path in candidates if ran.count(path) == 1]
    reading = _reading(module, once, arguments)
    found: dict[str, list[Made]] = {}
    for path in reading:
        site, producer = candidates[path]
        units = _of_teacher(site, keep, model, teacher)
        if units is not None and len(units):
            made = _made(site, producer, path, units, teacher)
            made = replace(made, norm=_norm_behind(teacher, root, made, arguments))
            found.setdefault(site.name, []).append(made)
    return found


def _norm_behind(teacher: OpenModel, root: str, made: Made, arguments: Arguments) -> str:
    """Path of the BatchNorm that is given just what the producer gives; '' if there is none, or no need of one."""
    if layer_of(teacher.module, made.path).bias is not None:
        return ""
    norms = [path for path in made.site.carried if is_affine_norm(teacher.module.get_submodule(path))]
    into = {path: Place(within(root, path), 0, 0) for path in norms}
    found = run_block(teacher.module.get_submodule(root), arguments, {made.output, *into.values()})
    given = found[made.output]
    return next((path for path, place in into.items() if torch.equal(found[place], given)), "")


def _made(site: Site, producer: Producer, path: str, units: Tensor, teacher: OpenModel) -> Made:
    layer = teacher.module.get_submodule(producer.path)
    convolves = isinstance(layer, nn.Conv2d)
    return Made(
        site=site,
        producer=producer,
        input=Place(path, 0, 0),
        output=Place(path, 0, None),
        rows=rows_of(teacher.anatomy[site.name], producer, units),
        axis=channel_axis(layer),
        batch_axis=0 if convolves else site.batch_axis,
    )


def _reading(block: nn.Module, paths: list[str], arguments: Arguments) -> list[str]:
    """Those of the modules whose inputs change with the block's hidden states: not what reads another stream alone."""
    if not paths:
        return []
    places = {path: Place(path, 0, 0) for path in paths}
    hidden = hidden_argument(*arguments)
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden)
    others = with_hidden(arguments, hidden + noise * (hidden.std() or 1))
    before, after = (run_block(block, given, set(places.values())) for given in (arguments, others))
    return [path for path, place in places.items() if not torch.equal(before[place], after[place])]


def _of_teacher(
    site: Site, keep: Mapping[str, list[int]], model: OpenModel, teacher: OpenModel
) -> Tensor | None:
    """The kept units of a site as the teacher counts them; None where nothing tells.

    A teacher that was pruned less, or not at all, has more units; the models' records say which.
    """
    kept = list(keep.get(site.name, range(site.units)))
    if teacher is not model and teacher.anatomy[site.name].units != site.units:
        if model.record is None:
            return None
        original = [model.record.kept[site.name][unit] for unit in kept]
        has = teacher.record.kept[site.name] if teacher.record else range(teacher.anatomy[site.name].units)
        places = {unit: place for place, unit in enumerate(has)}
        if any(unit not in places for unit in original):
            return None
        kept = [places[unit] for unit in original]
    return torch.as_tensor(kept, dtype=torch.long)
