"""Resolve a family's token table against a live model: the boundaries where tokens can be merged."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from optin_cli.architectures.paths import placed
from optin_cli.architectures.schema import Family
from optin_cli.errors import ArtefactError, param
from optin_cli.structure.anatomy import HEADS, Anatomy, Site, TokenSite

if TYPE_CHECKING:
    from torch import nn


def token_sites(
    model: nn.Module, family: Family, blocks: Sequence[str], sites: Sequence[Site]
) -> tuple[TokenSite, ...]:
    """One boundary behind each block; none at all where the family or this variant of it can't merge tokens.

    A variant can't where a block has no site of heads with the table's keys, or an attention without the argument.
    """
    if family.tokens is None:
        return ()
    found = []
    for index, block in enumerate(blocks):
        table = placed(family.tokens, block)
        for site in sites:
            if site.block != index or site.kind != HEADS:
                continue
            keys = next((p for p in site.producers if p.path == table.keys), None)
            if keys is None or table.part >= keys.parts:
                continue
            if table.bias in inspect.signature(model.get_submodule(table.attention).forward).parameters:
                found.append(TokenSite(index, site.name, keys, table.part, table.attention, table.bias))
    return tuple(found) if len(found) == len(blocks) else ()


def count_prefix(base: nn.Module, family: Family) -> int:
    """Tokens in front of `base`, the model without its task head, that are never merged."""
    return sum(_count(base, path) for path in family.tokens.prefix) if family.tokens else 0


def _count(base: Any, path: str) -> int:
    found = base
    for name in path.split("."):
        found = getattr(found, name, None)
    if found is None or isinstance(found, int):
        return found or 0
    return int(found.shape[-2]) if found.dim() > 1 else 1  # (1, tokens, d), or one token (d,)


def check_merges(anatomy: Anatomy, merges: Sequence[int], what: str) -> None:
    """Raise `ArtefactError` for a schedule that a model of this anatomy can't run: `merges[l]` tokens behind block l.

    `what` names the schedule's place in the message: schedules come from masks and from what `apply` wrote.
    """
    way_out = (
        f"select with a ranking of this model again (`{param('tokens', 'joint')}` or `only`), and apply that"
    )
    depth = len(anatomy.blocks)
    if not any(merges) and len(merges) <= depth:
        return
    if not anatomy.token_sites:
        raise ArtefactError(
            f"{what} merges tokens, and this model of family {anatomy.family!r} has no sites of tokens",
            "`optin families` lists the families whose tokens can be merged",
        )
    if len(merges) > depth:
        raise ArtefactError(
            f"{what} merges tokens behind {len(merges)} blocks, and the model has {depth}",
            way_out,
        )
    if bad := [count for count in merges if type(count) is not int or count < 0]:
        raise ArtefactError(f"{what} merges {bad[0]!r} tokens behind a block, no number of tokens", way_out)
    if len(merges) == depth and merges[-1]:
        raise ArtefactError(
            f"{what} merges tokens behind the last block, where nothing is saved by it", way_out
        )
