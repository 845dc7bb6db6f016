"""Copy refitted layers of the pruned model into the rows and columns that they have in the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from optin_cli.loading.checkpoint import OpenModel
from optin_cli.structure.anatomy import Anatomy, Site
from optin_cli.structure.layers import by_output
from optin_cli.transforms import slicing
from optin_cli.transforms.slicing import rows_of, scale_factors


def write_back(model: OpenModel, site: Site, keep: Mapping[str, list[int]], pruned: nn.Module) -> None:
    """Copy what was fitted behind a site into the whole model."""
    whole, fitted = (layer_of(module, site.consumer) for module in (model.module, pruned))
    if fitted.weight is whole.weight:  # neither sliced nor refitted
        return
    weight = by_output(whole).data
    columns = kept_features(site, keep).to(weight.device)
    rows = kept_outputs(model.anatomy, site, keep, len(weight)).to(weight.device)
    weight[rows[:, None], columns] = by_output(fitted).data
    if whole.bias is not None and fitted.bias is not None:
        whole.bias.data[rows] = fitted.bias.data.clone()  # one tensor, where it was left alone
    if site.norm:
        whole_norm, fitted_norm = (module.get_submodule(site.norm) for module in (model.module, pruned))
        assert isinstance(whole_norm, nn.BatchNorm2d) and isinstance(fitted_norm, nn.BatchNorm2d)
        whole_norm.bias.data[rows] = fitted_norm.bias.data.clone()


def write_back_producers(
    model: OpenModel, site: Site, keep: Mapping[str, list[int]], pruned: nn.Module
) -> None:
    """Copy into the whole model what was fitted before a site; as another site's consumer a layer is copied already."""
    units = _units(site, keep)
    for producer in site.producers:
        whole, fitted = (layer_of(module, producer.path) for module in (model.module, pruned))
        if fitted.weight is whole.weight or model.anatomy.read_by(producer.path):
            continue
        rows = rows_of(site, producer, units).to(whole.weight.device)
        factors = scale_factors(site, producer, units)
        by_output(whole).data[rows] = _unscaled(by_output(fitted).data, factors)
        if whole.bias is not None:
            bias = _unscaled(fitted.bias.data, factors)
            whole.bias.data[rows] = bias.clone()  # one tensor, where it was left alone
    made = kept_made(site, keep)
    for path in site.carried:
        norm = model.module.get_submodule(path)
        if isinstance(norm, nn.BatchNorm2d) and norm.affine:
            norm.bias.data[made] = layer_of(pruned, path).bias.data.clone()


def write_back_whole(model: OpenModel, path: str, pruned: nn.Module) -> None:
    """Copy a fitted layer that belongs to no site: it has all of its rows and columns."""
    whole, fitted = (layer_of(module, path) for module in (model.module, pruned))
    if fitted.weight is whole.weight:
        return
    whole.weight.data = fitted.weight.data.clone()
    if whole.bias is not None:
        whole.bias.data = fitted.bias.data.clone()


def _unscaled(values: Tensor, factors: Tensor | None) -> Tensor:
    """Rows of a layer, [rows, ...], before they were multiplied to keep the scale of logits."""
    if factors is None:
        return values
    shaped = factors.to(values.device).reshape(-1, *[1] * (values.dim() - 1))
    return (values.double() / shaped).to(values.dtype)


def kept_features(site: Site, keep: Mapping[str, list[int]]) -> Tensor:
    """Features of the consumer's input that stay: (units, width) -> (features,)."""
    return slicing.kept_features(site, _units(site, keep))


def kept_made(site: Site, keep: Mapping[str, list[int]]) -> Tensor:
    """Outputs of a site's producer that stay: (units, rows) -> (outputs,)."""
    return slicing.kept_made(site, _units(site, keep))


def _units(site: Site, keep: Mapping[str, list[int]]) -> Tensor:
    return torch.as_tensor(keep.get(site.name, range(site.units)), dtype=torch.long)


def kept_outputs(anatomy: Anatomy, site: Site, keep: Mapping[str, list[int]], outputs: int) -> Tensor:
    """Outputs of a site's consumer that stay: all but where they are units of another site."""
    behind = anatomy.fed_by(site.consumer)
    return torch.arange(outputs) if behind is None else kept_made(behind, keep)


def layer_of(module: nn.Module, path: str) -> Any:
    """The consumer at `path`: a Linear, a Conv1D or a Conv2d."""
    return module.get_submodule(path)
