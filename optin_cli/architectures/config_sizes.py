"""The entries of a config from which the model's own class builds layers of the sizes that are left.

A config says one size for all blocks: only a uniform model has one. Tables name the entries (`SiteTable.config`).
"""

from __future__ import annotations

import copy
from math import gcd
from typing import TYPE_CHECKING, Any

from optin_cli.architectures.resolve import has_path
from optin_cli.artefacts.facts import SizedBy
from optin_cli.structure.anatomy import ALL_HEADS, HEAD_WIDTH, RATIO, UNITS, Anatomy, Site
from optin_cli.structure.layers import shape_of

if TYPE_CHECKING:
    from torch import nn


def sized_by_config(model: nn.Module, anatomy: Anatomy) -> dict[str, SizedBy]:
    """Site -> the entry that sizes it, and its units for each that the entry counts; without sites that none sizes."""
    entries = [
        (site, *next(iter(site.config.items())))
        for site in anatomy
        if site.config and not _has_other_tables(model, anatomy, site)
    ]
    outputs: dict[str, list[int]] = {}
    for site, entry, _ in entries:
        outputs.setdefault(_full_name(anatomy, site, entry), []).append(_outputs(model, site))
    found: dict[str, SizedBy] = {}
    accepted: dict[str, list[int]] = {}
    for site, entry, what in entries:
        name = _full_name(anatomy, site, entry)
        each = _outputs(model, site) // gcd(*outputs[name]) if what == RATIO else 1
        found[site.name] = {"entry": name, "each": each}
        if shared := _table(model, anatomy, site):
            found[site.name]["same"] = shared
        if width := next((one for one, kind in site.config.items() if kind == HEAD_WIDTH), ""):
            found[site.name]["width"] = _full_name(anatomy, site, width)
        if what == ALL_HEADS:
            if name not in accepted:
                accepted[name] = _accepted(model, anatomy, site)
            if len(accepted[name]) < site.units:
                found[site.name]["counts"] = accepted[name]
    return found


def _table(model: nn.Module, anatomy: Anatomy, site: Site) -> str:
    """The table that the site's input is made from: its block's, or that of the last block before it that has one."""
    stream = anatomy.stream_of(site.block)
    before = [
        one
        for one in anatomy
        if one.label == site.label and one.block <= site.block and anatomy.stream_of(one.block) == stream
    ]
    paths = [given.table for one in reversed(before) for given in one.unit_inputs if given.table]
    return next((path for path in paths if has_path(model, path)), "")


def _has_other_tables(model: nn.Module, anatomy: Anatomy, site: Site) -> bool:
    """Return whether the site's input is made from a table outside of the blocks, too (BEiT's shared biases)."""
    for given in site.unit_inputs:
        owner = given.table.rpartition(".")[0]
        if not owner or not has_path(model, owner):
            continue
        kind = type(model.get_submodule(owner))
        others = (path for path, part in model.named_modules() if type(part) is kind)
        inside = tuple(f"{block}." for block in anatomy.blocks)
        if not kind.__module__.startswith("torch.") and any(not path.startswith(inside) for path in others):
            return True
    return False


def _accepted(model: Any, anatomy: Anatomy, site: Site) -> list[int]:
    """The numbers of units that the config takes for valid: of some, heads must divide the hidden size."""
    from huggingface_hub.errors import StrictDataclassError

    config: Any = copy.deepcopy(getattr(model, "config", None))
    if not hasattr(config, "validate"):
        return list(range(1, site.units + 1))
    found = []
    for units in range(1, site.units + 1):
        try:
            for entry, value in _values(site, units).items():
                set_entry(config, _full_name(anatomy, site, entry), value)
            config.validate()
        except StrictDataclassError:
            continue
        found.append(units)
    return found


def set_entry(config: Any, name: str, value: Any) -> None:
    """Set `encoder.intermediate_size` and the like."""
    *owners, entry = name.split(".")
    for owner in owners:
        config = getattr(config, owner)
    setattr(config, entry, value)


def _values(site: Site, units: int) -> dict[str, int]:
    """Entry -> value for so many units, but for ratios."""
    sizes = {UNITS: units, ALL_HEADS: units * site.group, HEAD_WIDTH: site.width // site.group}
    return {entry: sizes[what] for entry, what in site.config.items() if what != RATIO}


def config_entries(model: nn.Module, anatomy: Anatomy) -> dict[str, Any]:
    """Entry -> value that builds what `model` has. Raises `ValueError` where blocks differ, naming both sizes."""
    found: dict[str, Any] = {}
    ratios: dict[str, list[tuple[int, int]]] = {}
    for site in anatomy:
        values = _values(site, site.units)
        for entry, what in site.config.items():
            name = _full_name(anatomy, site, entry)
            if what == RATIO:
                ratios.setdefault(name, []).append((site.units, _outputs(model, site)))
            elif found.setdefault(name, values[entry]) != values[entry]:
                raise ValueError(
                    f"{site.name} has {values[entry]} where others have {found[name]}: {name} is one number"
                )
    return found | {name: _ratio(name, sizes) for name, sizes in ratios.items()}


def _ratio(name: str, sizes: list[tuple[int, int]]) -> float:
    """A number that gives all (units, outputs) as int(number * outputs)."""
    units, outputs = max(sizes, key=lambda size: size[1])
    for ratio in (units / outputs, (units + 0.5) / outputs):  # a quotient may be rounded down
        if all(int(ratio * outputs) == units for units, outputs in sizes):
            return ratio
    raise ValueError(f"no {name} gives {', '.join(f'{n} units at width {width}' for n, width in sizes)}")


def _outputs(model: nn.Module, site: Site) -> int:
    return shape_of(model.get_submodule(site.consumer), site.consumer).outputs


def _full_name(anatomy: Anatomy, site: Site, entry: str) -> str:
    return anatomy.stream_of(site.block).config + entry
