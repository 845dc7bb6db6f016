"""Read the anatomy off a live model: a family's table of paths, resolved against its modules."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from difflib import SequenceMatcher
from fnmatch import fnmatchcase
from math import prod
from typing import TYPE_CHECKING, Any

from torch import nn

from optin_cli.architectures.costs import Cost, coupled_layers, plain, unit_costs
from optin_cli.architectures.families import DOCS, TOWERS, find_family, known_families
from optin_cli.architectures.paths import LINKED, linked, passing_blocks, placed
from optin_cli.architectures.schema import Family, SiteTable
from optin_cli.architectures.ties import refuse_ties
from optin_cli.architectures.token_sites import count_prefix, token_sites
from optin_cli.errors import InputError, UnknownArchitecture, param
from optin_cli.structure.anatomy import HEADS, UNITS, Anatomy, Site, Stream
from optin_cli.structure.fields import described
from optin_cli.structure.hidden_states import cache_argument
from optin_cli.structure.layers import (
    channel_axis,
    is_affine_norm,
    is_grouped,
    passes_units,
    shape_of,
)

if TYPE_CHECKING:
    from torch import nn

    from optin_cli.architectures.positions import Positions


_OTHER_INPUTS = {"vision-encoder-decoder": "images", "speech-encoder-decoder": "recordings"}
_NEAREST = 5  # families that the error about an unlisted architecture names


def family_of(model: nn.Module, given: Family | None = None) -> Family:
    """The family `given` for a dense model, or the registered one by `config.model_type` or the name of its class.

    Raises `UnknownArchitecture` naming what was looked for and the families whose names are nearest.
    """
    if given is not None:
        return _settled(model, given)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    candidates = [model_type] if model_type else []
    for cls in type(model).__mro__:  # libraries share names: torchvision.ConvNeXt is not timm's
        candidates += [f"{cls.__module__.partition('.')[0]}.{cls.__name__}", cls.__name__]
    family = find_family(candidates)
    if family is None:
        if towers := next((TOWERS[name] for name in candidates if name in TOWERS), None):
            raise UnknownArchitecture(
                f"a {type(model).__name__} has two towers, and a family describes one list of blocks",
                f"open a tower of it with {' or '.join(towers)}, save that with save_pretrained, and prune it",
            )
        names = ", ".join(
            f"{f.name} ({', '.join(f.matches)})" for f in _nearest(model, model_type or type(model).__name__)
        )
        if model_type in _OTHER_INPUTS:
            raise UnknownArchitecture(
                f"a {type(model).__name__} writes text about {_OTHER_INPUTS[model_type]}, and no task of optin does",
                "prune its encoder alone: open it with transformers, save the encoder with save_pretrained, and give "
                "that folder",
            )
        raise UnknownArchitecture(
            f"no family table for {type(model).__name__}"
            + (f" (model_type {model_type!r})" if model_type else ""),
            f"`optin families --trace MODEL -o FILE.yaml` proposes a table for {param('family')}; {DOCS} shows how to "
            f"write one. The nearest known are {names}; `optin families` lists all",
        )
    return _settled(model, family)


def _settled(model: nn.Module, family: Family) -> Family:
    """`family` for a dense model and all that is made of it: query heads are units in each of them or in none.

    A block of another model may have a single group left when it is pruned: that stays one unit.
    """
    if not any(table.query_heads for table in family.sites):
        return family
    grouped = {site.label for site in dissect(model, family, costs=False) if site.group > 1}
    tables = (replace(t, query_heads=t.query_heads and t.label not in grouped) for t in family.sites)
    return replace(family, sites=tuple(tables))


def _nearest(model: nn.Module, name: str) -> list[Family]:
    """The families whose tables find most of their layers in `model`; of equal ones those spelt most like `name`."""

    def likeness(family: Family) -> tuple[float, float]:
        spelt = (
            SequenceMatcher(None, name.lower(), other.lower()) for other in (family.name, *family.matches)
        )
        return _layers_found(model, family), max(matcher.ratio() for matcher in spelt)

    return sorted(known_families(), key=likeness, reverse=True)[:_NEAREST]


def _layers_found(model: nn.Module, family: Family) -> float:
    """Share of the layers of a family's tables that the first block has."""
    try:
        blocks, _ = find_streams(model, family, base_prefix(model))
    except (InputError, AttributeError):  # no such blocks, or a config that does not say how often they run
        return 0.0
    block = model.get_submodule(blocks[0])
    paths = [path for t in family.sites for path in (t.consumer, *(p.path for p in t.producers)) if path]
    return sum(has_path(block, path) for path in paths) / max(1, len(paths))


def dissect(model: nn.Module, family: Family, costs: bool = True) -> Anatomy:
    """Resolve `family` against `model` (dense or already pruned, real or meta tensors).

    Without `costs` a hierarchical model is not run to count what each site sees: its MACs are then not to be used.
    Raises `InputError` naming the table's path and the module that lacks it, when producers and consumer don't fit
    each other, and for weights that two modules share and slicing would treat differently.
    """
    base = getattr(model, "base_model", model)
    blocks, streams = find_streams(model, family, base_prefix(model))
    seen = None
    if costs and family.hierarchical:
        seen = _count_positions(model, blocks[0], streams[0].layout, family.modality)
    own = [i for i, block in enumerate(blocks) if block not in blocks[:i]]
    tables = [(i, table) for i in own for table in _tables_in(model, family, blocks, i)]
    ends = Counter(path for _, t in tables for path in (t.consumer, *(p.path for p in t.producers)))
    passed = passing_blocks(model, blocks)
    sites = [
        replace(_used(_site(model, family, t, i, ends, seen), blocks.count(blocks[i])), passed=passed)
        for i, t in tables
    ]
    if not sites:
        raise InputError(
            f"nothing is prunable in {type(model).__name__}: every site of family {family.name!r} has a module "
            "that mixes its units, or lacks what its tables require",
            f"{DOCS} explains `must_be_identity` and `requires`",
        )
    refuse_ties(model, sites)
    tokens = token_sites(model, family, blocks, sites)
    return Anatomy(
        family.name,
        tuple(blocks),
        tuple(sites),
        tokens,
        count_prefix(base, family),
        streams=tuple(streams),
        chained=family.chained and len(streams) == 1,
        coupled=coupled_layers(model, sites, seen),
    )


def _used(site: Site, times: int) -> Site:
    """A site of a module that runs so many times."""
    per_token, per_pair = times * site.macs_per_token, times * site.macs_per_pair
    base = times * site.base_macs_per_token
    return replace(site, macs_per_token=per_token, macs_per_pair=per_pair, base_macs_per_token=base)


def _count_positions(model: nn.Module, first_block: str, layout: str, modality: str) -> Positions:
    from optin_cli.architectures.positions import count_positions

    return count_positions(model, first_block, layout, modality)


def _tables_in(model: nn.Module, family: Family, blocks: list[str], index: int) -> list[SiteTable]:
    """The first table of each name that fits a block, with paths from the model; without those whose units mix."""
    fitting: dict[str, SiteTable] = {}
    for table in family.sites:
        if all(has_path(model.get_submodule(blocks[index]), path) for path in table.requires):
            fitting.setdefault(table.label, table)
    found = [placed(table, blocks[index]) for table in fitting.values()]
    linking = [t if t.producers else linked(model, t, blocks[: index + 1]) for t in found]
    return [table for table in linking if table and not _is_mixed(model, family, table)]


def has_path(block: nn.Module, path: str) -> bool:
    """True if there is a module or an attribute at `path`; None is none."""
    found: Any = block
    for name in path.split("."):
        found = getattr(found, name, None)
    return found is not None


def _site(
    model: nn.Module,
    family: Family,
    table: SiteTable,
    index: int,
    ends: Mapping[str, int],
    seen: Positions | None,
) -> Site:
    """The site of a placed table; `ends` says how many sites begin or end at a layer."""

    def module(path: str) -> nn.Module:
        return _module(model, path, family)

    name = f"blocks.{index}.{table.label}"
    layer = module(table.consumer)
    features = shape_of(layer, table.consumer).inputs
    group = max(1, int(_attribute(model, table.group, family))) if table.group else 1
    units, width, spread = _units(model, family, table, name, features, group)
    one_group = table.query_heads and units == 1 and group > 1
    if one_group:
        table, units, width, group = _by_query_head(table), group, width // group, 1

    def share(path: str) -> float:
        return seen.share(path) if seen else 1

    def costs(ends: Mapping[str, int]) -> list[Cost]:
        return list(unit_costs(table, width, group, spread, module, ends, one_group))

    def macs(ends: Mapping[str, int], base: bool = False) -> float:
        return sum(cost.macs * share(cost.path) for cost in costs(ends) if cost.base == base)

    params = sum(cost.params for cost in costs(ends) if not cost.base)
    base_params = sum(cost.params for cost in costs(ends) if cost.base)
    per_token, alone = macs(ends), macs({})
    own_share = per_token / alone if alone else 1
    per_pair = 2 * width if table.kind == HEADS and table.pairs else 0
    if table.relative:
        kinds = len(_attribute(model, table.relative.kinds, family) or ())
        if table.relative.rows:
            per_token += kinds * 2 * int(_attribute(model, table.relative.rows, family)) * width
        else:
            per_pair += kinds * 2 * width
    if seen:  # every position attends to those of its window, or to what the values are made of
        per_token += per_pair * share(table.consumer) * seen.group(table.producers[-1].path)
        per_pair = 0
    for producer in table.producers:
        given_features = shape_of(module(producer.path), producer.path).outputs
        rows = producer.rows_of(width // spread, group)
        slices = 1 if one_group and producer.shared else units
        if given_features != producer.parts * slices * rows:
            raise InputError(
                f"{name}: {producer.path} gives {given_features} features, but {producer.parts} x {slices} units x "
                f"{rows} feed {table.consumer}",
                f"the table of family {family.name!r} does not describe this model: see {DOCS}",
            )
    for given in table.unit_inputs:
        owner = module(given.module)
        if given.argument not in inspect.signature(owner.forward).parameters:
            raise InputError(
                f"{name}: {given.module} ({type(owner).__name__}) takes no argument {given.argument!r}",
                f"the table of family {family.name!r} does not describe this model: see {DOCS}",
            )
    for path in table.counts:
        _attribute(model, path, family)
    for path, axis in table.tensors.items():
        params += _slice_size(model, family, path, axis, units, width, name)
    bypass = table.bypass
    if bypass and not bypass.empty and not table.consumer.startswith(f"{bypass.module}."):
        raise InputError(
            f"{name}: {bypass.module} can't give the bias of {table.consumer}, which is outside of it"
        )
    if bypass and bypass.cache:  # its name is another one in other versions of the library
        bypass = replace(bypass, cache=cache_argument(module(bypass.module), bypass.cache))
    ranks = table.ranks
    if ranks and any(_mixes_units(model, path, family) for path in ranks.must_be_identity):
        ranks = None
    same = {one.name: getattr(table, one.name) for one in described(Site)} | {
        "bypass": bypass,
        "ranks": ranks,
    }
    found = Site(
        name=name,
        block=index,
        units=units,
        width=width,
        group=group,
        one_group=one_group,
        spread=spread,
        axis=channel_axis(layer),
        macs_per_token=plain(per_token),
        macs_per_pair=per_pair,
        params_per_unit=plain(params),
        base_macs_per_token=plain(macs(ends, base=True)),
        base_params=plain(base_params),
        chained=table.unit_width == LINKED,
        own_share=own_share,
        **same,
    )
    there = tuple(path for path in table.carried if has_path(model, path))
    return replace(found, carried=there, norm=_norm_behind(model, table))


def _by_query_head(table: SiteTable) -> SiteTable:
    """The table of a single group by its heads of queries: the group becomes smaller, and its keys and values stay."""
    config = {entry: what for entry, what in table.config.items() if what != UNITS}
    return replace(table, counts={**table.counts, table.group: "units"}, config=config)


def _norm_behind(model: nn.Module, table: SiteTable) -> str:
    """Path of the norm behind the consumer; '' where there is none with a bias."""
    if not table.norm or not has_path(model, table.norm):
        return ""
    return table.norm if is_affine_norm(model.get_submodule(table.norm)) else ""


def _units(
    model: nn.Module, family: Family, table: SiteTable, name: str, features: int, group: int
) -> tuple[int, int, int]:
    """(units, width of one, features that an output of the producer becomes) where a consumer takes `features`.

    A unit is a group of heads.
    """
    if table.unit_width == LINKED:
        units = shape_of(model.get_submodule(table.producers[0].path), table.producers[0].path).outputs
        spread, rest = divmod(features, units) if units else (1, features)
        once = channel_axis(model.get_submodule(table.consumer)) != -1  # only a Linear reads a flattened map
        if rest or (once and spread != 1):
            raise InputError(
                f"{name}: {table.producers[0].path} gives {units} features, and {table.consumer} takes {features}",
                f"name the producers in the table of family {family.name!r}: see {DOCS}",
            )
        return units, spread, spread
    way_out = f"correct unit_width or unit_count in the table of family {family.name!r}: see {DOCS}"
    if table.unit_count:
        units = int(_attribute(model, table.unit_count, family))
        width, rest = divmod(features, units) if units else (1, features)  # none left: any width will do
        if rest:
            raise InputError(
                f"{name}: {table.consumer} takes {features} features, no multiple of its {units} units",
                way_out,
            )
        return units, width, 1
    given = table.unit_width
    width = group * (given if isinstance(given, int) else int(_attribute(model, given, family)))
    units, rest = divmod(features, width)
    if rest:
        raise InputError(
            f"{name}: {table.consumer} takes {features} features, no multiple of the unit width {width}",
            way_out,
        )
    return units, width, 1


def _slice_size(
    model: nn.Module, family: Family, path: str, axis: int, units: int, width: int, name: str
) -> int:
    """Parameters that one unit has in a tensor with one slice a unit or a feature; a buffer has none."""
    from torch import nn

    tensor = _attribute(model, path, family)
    shape = list(getattr(tensor, "shape", ()))
    if not -len(shape) <= axis < len(shape) or shape[axis] not in (units, units * width):
        raise InputError(
            f"{name}: {path} of shape {tuple(shape)} has no slice along axis {axis} for each of {units} units",
            f"the table of family {family.name!r} does not describe this model: see {DOCS}",
        )
    each = width if shape[axis] != units else 1
    del shape[axis]
    return each * prod(shape) if isinstance(tensor, nn.Parameter) else 0


def _is_mixed(model: nn.Module, family: Family, table: SiteTable) -> bool:
    """True if something mixes the units of a placed table: a module that should not be, or groups."""
    if any(_mixes_units(model, path, family) for path in table.must_be_identity):
        return True
    ends = table.consumer, *table.readers, *(producer.path for producer in table.producers)
    if any(is_grouped(_module(model, path, family)) for path in ends):
        return True
    return any(not passes_units(_module(model, path, family)) for path in table.carried)


def _module(model: nn.Module, path: str, family: Family) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise InputError(
            f"family {family.name!r} expects {path} in {type(model).__name__}: {error}",
            BUILT_OTHERWISE,
        ) from error


def _attribute(model: nn.Module, path: str, family: Family) -> Any:
    owner, _, attribute = path.rpartition(".")
    module = _module(model, owner, family)
    if not hasattr(module, attribute):
        raise InputError(f"family {family.name!r} expects {path} in {type(model).__name__}", BUILT_OTHERWISE)
    return getattr(module, attribute)


def _mixes_units(model: nn.Module, path: str, family: Family) -> bool:
    """True if there is a real module at `path`: absent, None and Identity leave the units apart."""
    from torch import nn

    owner, _, attribute = path.rpartition(".")
    module = getattr(_module(model, owner, family), attribute, None)
    return module is not None and not isinstance(module, nn.Identity)


BUILT_OTHERWISE = (
    "this variant is built otherwise than its table says; describe it in a FILE.yaml for "
    f"{param('family')}: {DOCS}"
)


def base_prefix(model: nn.Module) -> str:
    """Return the prefix of paths within the base model (without the task head): a path and a dot, or nothing."""
    base = getattr(model, "base_model", model)
    prefix = next((name for name, module in model.named_modules() if module is base), "")
    return f"{prefix}." if prefix else ""


def find_streams(model: nn.Module, family: Family, prefix: str) -> tuple[list[str], list[Stream]]:
    """Paths of the blocks, in the order they run, and the streams that they form. Raises `InputError` without any."""
    blocks: list[str] = []
    streams: list[Stream] = []
    looked: list[str] = []
    for table in family.all_streams:
        patterns = [prefix + pattern for pattern in table.patterns]
        found = _repeated(model, family, _blocks(model, patterns))
        if found:
            streams.append(Stream(len(blocks), table.layout, table.mask, table.config))
        blocks += found
        looked += patterns
    if not blocks:
        raise InputError(
            f"family {family.name!r}: {type(model).__name__} has no blocks at "
            + " or ".join(f"{path} ({_deepest(model, path)})" for path in looked),
            BUILT_OTHERWISE,
        )
    return blocks, streams


def _deepest(model: nn.Module, pattern: str) -> str:
    """Describe how much of a pattern's path exists: the last module on it, and what it holds."""
    path, module = "", model
    for name in pattern.split("."):
        child = getattr(module, name, None)
        if not isinstance(child, nn.Module):
            break
        path, module = f"{path}.{name}".lstrip("."), child
    held = ", ".join(name for name, _ in module.named_children()) or "nothing"
    return f"{path or 'the model'} is a {type(module).__name__} and holds {held}"


def _blocks(model: nn.Module, patterns: list[str]) -> list[str]:
    """Paths of the modules that match a pattern, as they are registered; plain paths in the order they are given."""
    found = [
        path
        for path, module in model.named_modules()
        if any(_matches(path, pattern) for pattern in patterns) and not isinstance(module, nn.Identity)
    ]
    if not any(set("*?[") & set(pattern) for pattern in patterns):
        found.sort(key=patterns.index)
    return found


def _repeated(model: nn.Module, family: Family, modules: list[str]) -> list[str]:
    """The module of each block, where modules run several times."""
    if not family.repeats or not modules:
        return modules
    depth = int(getattr(model.config, family.repeats))
    return [modules[block * len(modules) // depth] for block in range(depth)]


def _matches(path: str, pattern: str) -> bool:
    """True if every part of a dotted path matches the one of the pattern."""
    names, wanted = path.split("."), pattern.split(".")
    return len(names) == len(wanted) and all(map(fnmatchcase, names, wanted))
