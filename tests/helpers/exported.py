"""Exported files in tests: made once, run by their runtime alone."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from helpers.models import new_folder, saved_model
from helpers.pruning import sliced_copy
from helpers.runs import random_inputs
from optin_cli.loading.checkpoint import OpenModel, open_model
from optin_cli.runtimes.checks import Checks
from optin_cli.runtimes.export import Exported, ExportSettings, export


def dense_of(name: str, head: str = "classifier") -> Path:
    """A tiny model of two blocks, where its family can have so few: to export one costs as much as it has blocks."""
    return saved_model(name, head, blocks=2) if name in ("bert", "llama") else saved_model(name, head)


def emptied(name: str, head: str = "classifier") -> Path:
    """That model without the heads of its first block, the neurons of its second, and half of the rest."""
    return _emptied(name, head)


@cache
def _emptied(name: str, head: str) -> Path:
    dense, target = open_model(str(dense_of(name, head)), device="cpu"), new_folder() / f"{name}-emptied"
    keep = {site.name: list(range((site.units + 1) // 2)) for site in dense.anatomy}
    heads = [site.name for site in dense.anatomy if site.kind == "heads"]
    others = [site.name for site in dense.anatomy if site.kind != "heads"]
    for site in (*heads[:1], *others[1:2]):
        keep[site] = []
    sliced_copy(dense, target, keep)
    return target


def checks_of(model: OpenModel) -> Checks:
    """Two random batches: of three examples and nine tokens, and of two and five."""
    return Checks([random_inputs(model), random_inputs(model, batch=2, tokens=5, seed=1)], "random", None)


@cache
def exported(name: str, to: str, pruned: bool = True, fp16: bool = False) -> tuple[OpenModel, Exported]:
    """(a tiny model in torch, the directory file that it was exported to)."""
    model = open_model(str(emptied(name) if pruned else dense_of(name)), device="cpu")
    output = new_folder() / f"{name}-{to}"
    return model, export(model, ExportSettings(to, fp16=fp16), output, checks_of)


def others(model: OpenModel) -> list[dict[str, Tensor]]:
    """Batches of sizes that no file was checked on."""
    return [random_inputs(model, batch=4, tokens=13, seed=2), random_inputs(model, batch=1, tokens=3, seed=3)]


@torch.no_grad()
def in_torch(model: OpenModel, inputs: dict[str, Tensor]) -> Tensor:
    return model.task.full_output(model.module, {**inputs, **model.family.arguments})
