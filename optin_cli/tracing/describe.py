"""Write a site that was found as a table: paths from its block, attributes for sizes."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from optin_cli.architectures.schema import SiteTable
from optin_cli.structure.layers import is_depthwise
from optin_cli.tracing.blocks import within
from optin_cli.tracing.sites import TracedSite
from optin_cli.tracing.verify import Trial, TrialFailure


def describe(module: nn.Module, site: TracedSite, block: str) -> SiteTable:
    """A site as a table with paths from its block, but for what only trying shows; the size of a unit is a number."""

    def rel(path: str) -> str:
        return path.removeprefix(f"{block}.")

    tensors: dict[str, int] = {}
    counts: dict[str, str] = {}
    for path in site.per_unit:
        if not within(path, block):
            continue
        layer = module.get_submodule(path)
        tensors[f"{rel(path)}.weight"] = 1 if isinstance(layer, nn.Embedding) else 0
        if getattr(layer, "bias", None) is not None:
            tensors[f"{rel(path)}.bias"] = 0
        counts |= {f"{rel(path)}.{attribute}": "units" for attribute in _sizes(layer)}
    return SiteTable(
        kind=site.kind,
        producers=tuple(replace(p, path=rel(p.path)) for p in site.producers),
        consumer=rel(site.consumer),
        carried=tuple(rel(path) for path in site.carried if within(path, block)),
        readers=tuple(rel(path) for path in site.readers),
        masked_at=_entry(site, block),
        norm=rel(site.norm) if site.norm and within(site.norm, block) else "",
        unit_width=site.width // site.group,
        counts=counts,
        tensors=tensors,
    )


def _sizes(layer: nn.Module) -> tuple[str, ...]:
    """The attributes of a layer that count its outputs."""
    if isinstance(layer, nn.Conv2d):
        return ("out_channels", "in_channels", "groups") if is_depthwise(layer) else ("out_channels",)
    return ("embedding_dim",) if isinstance(layer, nn.Embedding) else ("out_features",)


def _entry(site: TracedSite, block: str) -> str:
    """The module around all readers beside the consumer, and around nothing that comes before; '' without readers."""
    if not site.readers:
        return ""
    first = site.readers[0]
    outside = {site.consumer, *site.carried}
    outside |= {p.path for p in site.producers if not _reads(site, p.path)}
    best = first
    while (parent := best.rpartition(".")[0]) != block and not any(within(path, parent) for path in outside):
        best = parent
    return best.removeprefix(f"{block}.")


def _reads(site: TracedSite, producer: str) -> bool:
    """Return whether a producer is beside a reader: the expansion of a squeeze-and-excite."""
    return any(producer.rpartition(".")[0] == reader.rpartition(".")[0] != "" for reader in site.readers)


def name_group(trial: Trial, table: SiteTable, group: int) -> SiteTable:
    """With the attribute that holds how many heads share keys and values. Raises `TrialFailure` where there is none."""
    for below, owner in trial.block.get_submodule(trial.root).named_modules():
        for attribute, value in vars(owner).items():
            if type(value) is int and value == group and "group" in attribute:
                return replace(table, group=".".join(filter(None, (trial.root, below, attribute))))
    shared = next(p.path for p in table.producers if p.shared)
    raise TrialFailure(f"{group} heads share what {shared} gives, and no attribute holds that number")


def name_width(trial: Trial, table: SiteTable, width: int) -> SiteTable:
    """The attribute that holds the width of a head in place of the number, or the one that counts heads."""
    root = trial.block.get_submodule(trial.root)
    for below, owner in root.named_modules():
        for attribute, value in vars(owner).items():
            path = ".".join(filter(None, (trial.root, below, attribute)))
            is_width = type(value) is int and value == width and attribute.endswith(("head_dim", "head_size"))
            if is_width and path not in table.counts:
                return replace(table, unit_width=path)
    units = [
        path for path, kind in table.counts.items() if kind == "units" and "head" in path.rpartition(".")[2]
    ]
    return replace(table, unit_width=1, unit_count=units[0]) if units else table
