"""Turn what holds in single blocks into tables that fit all of them, and only where they should."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from optin_cli.architectures.resolve import dissect, has_path
from optin_cli.architectures.schema import Family, SiteTable
from optin_cli.errors import OptinError
from optin_cli.tracing.sites import LeftOut
from optin_cli.tracing.verify import Holder


@dataclass(frozen=True)
class TableMatch:
    """A table, and the blocks (by index) whose site it describes."""

    table: SiteTable
    blocks: tuple[int, ...]


def as_tables(
    blocks: Sequence[nn.Module], held: Iterable[tuple[SiteTable, int]]
) -> tuple[list[TableMatch], list[LeftOut]]:
    """Named tables of the sites that `held` in a block each, and what no table can distinguish from the rest.

    Tables of one name are alternatives, the most demanding first.
    """
    raw: list[tuple[SiteTable, list[int]]] = []
    for table, index in held:
        same = next((indices for other, indices in raw if other == table), None)
        if same is None:
            raw.append((table, [index]))
        else:
            same.append(index)
    wanted = named([TableMatch(table, tuple(indices)) for table, indices in raw])
    done: list[TableMatch] = []
    left: list[LeftOut] = []
    for fitted in sorted(wanted, key=lambda f: (-len(_paths(f.table)), -len(f.blocks))):
        earlier = {i for other in done if other.table.label == fitted.table.label for i in other.blocks}
        distinct = _distinguished(blocks, fitted, earlier)
        if distinct is None:
            why = "other blocks have modules of the same names that can't be sliced this way"
            left.append(LeftOut(f"blocks.{fitted.blocks[0]}.{fitted.table.consumer}", why))
        else:
            done.append(distinct)
    labels = [fitted.table.label for fitted in wanted]
    return named(sorted(done, key=lambda fitted: labels.index(fitted.table.label))), left


def named(fitted: Sequence[TableMatch]) -> list[TableMatch]:
    """Tables of one consumer have one name, those of different ones different names."""
    names = _names([one.table for one in fitted])
    return [
        replace(one, table=replace(one.table, name=names[one.table.kind, one.table.consumer]))
        for one in fitted
    ]


def _names(tables: Sequence[SiteTable]) -> Mapping[tuple[str, str], str]:
    """(kind, consumer) -> name: '' for the only consumer of its kind, the kind and a number for several."""
    consumers: dict[str, list[str]] = {}
    for table in tables:
        known = consumers.setdefault(table.kind, [])
        if table.consumer not in known:
            known.append(table.consumer)
    return {
        (kind, path): f"{kind}{number}" if len(paths) > 1 else ""
        for kind, paths in consumers.items()
        for number, path in enumerate(paths, 1)
    }


def _paths(table: SiteTable) -> list[str]:
    """All layers that a table needs."""
    return [*(producer.path for producer in table.producers), *table.readers, table.consumer]


def _distinguished(blocks: Sequence[nn.Module], fitted: TableMatch, earlier: set[int]) -> TableMatch | None:
    """The table with what it requires, so that it fits these blocks and none but those `earlier` ones have taken."""
    table, own = fitted.table, [blocks[i] for i in fitted.blocks]
    lacking = tuple(path for path in _paths(table) if not all(has_path(block, path) for block in blocks))
    table = replace(table, requires=lacking)
    strangers = [
        block
        for i, block in enumerate(blocks)
        if i not in fitted.blocks and i not in earlier and _fits(block, table)
    ]
    if not strangers:
        return replace(fitted, table=table)
    for path in _common(own):
        if not any(has_path(block, path) for block in strangers):
            return replace(fitted, table=replace(table, requires=(*lacking, path)))
    for path in _common(strangers):
        owner = path.rpartition(".")[0]
        if all(not _real(block, path) and (not owner or has_path(block, owner)) for block in own):
            return replace(fitted, table=replace(table, must_be_identity=(path,)))
    return None


def _common(blocks: Sequence[nn.Module]) -> list[str]:
    """Paths of real modules that all of `blocks` have."""
    return [
        path for path, _ in blocks[0].named_modules() if path and all(_real(block, path) for block in blocks)
    ]


def _real(block: nn.Module, path: str) -> bool:
    return has_path(block, path) and not isinstance(block.get_submodule(path), nn.Identity)


def _fits(block: nn.Module, table: SiteTable) -> bool:
    """Return whether `dissect` would find the site of a table in a block, or fail over it."""
    try:
        dissect(Holder(block), Family("trace", ("Holder",), ("block",), (table,)), costs=False)
    except OptinError as error:
        return not error.what.startswith("nothing is prunable")
    return True
