"""Slice units out of the weights: select the producers' rows, the consumer's columns and what is between them.

`Footprint` notes what that changed in a model: with it, `standalone.sizes.resize` cuts a dense model alike, whose
anatomy it need not know.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from optin_cli.architectures.resolve import has_path
from optin_cli.standalone import without_heads as attention_without_heads
from optin_cli.standalone.unit_inputs import select_unit_input
from optin_cli.structure.anatomy import BY_SIZE, CHANNELS, HEADS, Anatomy, Bypass, Producer, Site
from optin_cli.structure.layers import (
    like_weight,
    matrix,
    select_carried,
    select_inputs,
    select_outputs,
    select_slices,
)
from optin_cli.transforms.feature_info import FEATURE_INFO, update_feature_info

_SCALES = ("scale", "scaling")


def sharing_copy(module: nn.Module) -> nn.Module:
    """Other modules with the same tensors, to be sliced: that puts other tensors in their place."""
    return copy.deepcopy(module, {id(t): t for t in (*module.parameters(), *module.buffers())})


def slice_model(
    model: nn.Module, anatomy: Anatomy, keep: Mapping[str, Sequence[int]], *, uniform: bool = False
) -> None:
    """Remove, in place, every unit that `keep` does not list. Sites that `keep` does not name stay whole.

    `uniform` says that sites of one entry of the config keep as many units: what their inputs are made from is then
    sliced, in place of the inputs. The anatomy describes the model before slicing; dissect it again afterwards.
    """
    for name, indices in keep.items():
        site = anatomy[name]
        if any(not 0 <= index < site.units for index in indices):
            raise ValueError(f"{name}: a kept index is not among the {site.units} units")
        if len(indices) < site.units or site.rank:
            _slice_site(model, site, list(indices), uniform and bool(site.config))
    if any(
        anatomy[name].kind == CHANNELS and len(indices) < anatomy[name].units
        for name, indices in keep.items()
    ):
        update_feature_info(model)


def _slice_site(model: nn.Module, site: Site, units: list[int], uniform: bool) -> None:
    chosen = torch.as_tensor(units, dtype=torch.long)
    features, made = kept_features(site, chosen), kept_made(site, chosen)
    for producer in site.producers:
        layer = model.get_submodule(producer.path)
        select_outputs(layer, rows_of(site, producer, chosen))
        if (factors := scale_factors(site, producer, chosen)) is not None:
            scale_outputs(layer, factors)
    for path in site.carried:
        select_carried(model.get_submodule(path), made)
    for path in (*site.readers, site.consumer):
        select_inputs(model.get_submodule(path), features)
    width = site.kept_width
    sizes = {"units": len(units), "features": len(features), "width": width}
    for counted, kind in site.counts.items():
        owner, _, attribute = counted.rpartition(".")
        module = model.get_submodule(owner)
        if kind == "scale":  # it may be another one than its class would compute
            sizes["scale"] = getattr(module, attribute) * (site.width / width) ** 0.5
        setattr(module, attribute, sizes[kind])
    for unit_input in site.unit_inputs:
        if uniform:
            _slice_table(model, unit_input.table, chosen)
            continue
        options = {name: getattr(unit_input, name) for name in ("argument", "axis", "returned", "maker")}
        select_unit_input(model.get_submodule(unit_input.module), units=units, **options)
    for path, axis in site.tensors.items():
        owner, _, name = path.rpartition(".")
        module = model.get_submodule(owner)
        select_slices(module, name, axis, chosen if getattr(module, name).shape[axis] == site.units else made)
    if units:
        return
    if site.bypass:
        _bypass(model, site, site.bypass)
    elif site.kind == HEADS:
        attention_without_heads.attend_without_heads(model.get_submodule(_around(site)))


def _slice_table(model: nn.Module, path: str, units: Tensor) -> None:
    """The units' slices of what a block's input is made from; another block may have it."""
    owner, _, name = path.rpartition(".")
    if not owner or not has_path(model, path):
        return
    module = model.get_submodule(owner)
    select_slices(module, name, -1, units)
    if isinstance(module, nn.Embedding):
        module.embedding_dim = len(units)


def rows_of(site: Site, producer: Producer, units: Tensor) -> Tensor:
    """Rows of a producer that belong to `units` and stay, as they lie in it."""
    parts = [part_rows(site, producer, part, units) for part in range(producer.parts)]
    if producer.by_unit:  # (units, rows) of each part
        each = [rows.reshape(len(units), len(rows) // max(1, len(units))) for rows in parts]
        return torch.cat(each, dim=1).reshape(-1)
    return torch.cat(parts)


def part_rows(site: Site, producer: Producer, part: int, units: Tensor) -> Tensor:
    """The same of one part of a producer."""
    width = site.rows_of(producer)
    if site.is_base(producer):
        return torch.arange(width if len(units) else 0)
    if producer.by_unit:
        return features_of(units * producer.parts + part, width, site.rank)
    # else part-major: part p of feature f is row p * features + f
    return features_of(units, width, site.rank) + part * site.units * width


def kept_features(site: Site, units: Tensor) -> Tensor:
    """Features of the consumer's input that belong to `units` and stay."""
    return features_of(units, site.width, site.rank)


def kept_made(site: Site, units: Tensor) -> Tensor:
    """Outputs of a producer's part that belong to `units` and stay."""
    return features_of(units, site.rows, site.rank)


def features_of(units: Tensor, width: int, rank: int = 0) -> Tensor:
    """Unit indices -> feature indices: unit u owns features u * width .. (u + 1) * width - 1, or the first `rank`."""
    return (units[:, None] * width + torch.arange(rank or width)[None, :]).reshape(-1)


def scale_factors(site: Site, producer: Producer, units: Tensor) -> Tensor | None:
    """[rows of `rows_of`]: what the rows that make queries are multiplied by, so that a module that computes the scale
    of its logits from the size of its heads gives the same ones at a lower rank; None where nothing changes."""
    query, part = site.attended[0] if site.attended else (None, 0)
    if not (site.rank and site.ranks and site.ranks.scale == BY_SIZE and producer == query):
        return None
    rows = rows_of(site, producer, units)
    queries = torch.isin(rows, part_rows(site, producer, part, units))
    return torch.where(queries, (site.rank / site.width) ** 0.5, 1.0).double()


def scale_outputs(layer: nn.Module, factors: Tensor) -> None:
    """Multiply the outputs of a layer, in place."""
    weight = like_weight(layer, matrix(layer).detach().double() * factors.to(matrix(layer).device)[:, None])
    for name, value in (("weight", weight), ("bias", getattr(layer, "bias", None))):
        if value is not None:
            old = getattr(layer, name)
            new = value if name == "weight" else value.detach().double() * factors.to(value.device)
            setattr(layer, name, nn.Parameter(new.to(old.dtype), old.requires_grad))


def _bypass(model: nn.Module, site: Site, bypass: Bypass) -> None:
    """Let the module around the consumer run without units, and make what it makes for later blocks all the same."""
    path = bypass.module
    attention_without_heads.bypass(
        model.get_submodule(path),
        consumer="" if bypass.empty else site.consumer.removeprefix(f"{path}."),
        in_tuple=bypass.in_tuple,
        cache=bypass.cache,
        attended=bypass.attended,
        makes=[
            [one.argument, one.maker, one.needs]
            for one in site.unit_inputs
            if one.module == path and one.maker
        ],
    )


def _around(site: Site) -> str:
    """The innermost module that has the site's consumer and all its producers inside."""
    paths = [path.split(".")[:-1] for path in (site.consumer, *(one.path for one in site.producers))]
    shared = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
    return ".".join(names[0] for names in shared)


class Footprint:
    """The sizes in a model, to tell later what slicing has changed."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.sizes = {path: dict(_sizes(module)) for path, module in model.named_modules()}

    def changes(self, earlier: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What is different now, on top of `earlier` changes, as `standalone.sizes.resize` takes it.

        `sizes`: path of a module -> attribute: number, or tensor: shape. `runs`: path -> what makes the module run
        otherwise than its class.
        """
        sizes = {path: dict(found) for path, found in (earlier or {"sizes": {}})["sizes"].items()}
        runs = {}
        for path, module in self.model.named_modules():
            now = dict(_sizes(module))
            if changed := {name: size for name, size in now.items() if self.sizes[path].get(name) != size}:
                sizes.setdefault(path, {}).update(changed)
            if how := getattr(module, "optin_runs", None):
                runs[path] = copy.deepcopy(how)
        return {"sizes": sizes, "runs": runs}


def _sizes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, number or shape) of the attributes and tensors of a module itself."""
    for name, value in vars(module).items():
        if type(value) is int or _is_scale(name, value) or (name == FEATURE_INFO and isinstance(value, list)):
            yield name, copy.deepcopy(value)
    for name, tensor in itertools.chain(module._parameters.items(), module._buffers.items()):
        if tensor is not None:
            yield name, list(tensor.shape)


def _is_scale(name: str, value: Any) -> bool:
    """Whether a module multiplies logits by this attribute."""
    return name in _SCALES and type(value) is float
