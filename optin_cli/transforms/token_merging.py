"""Merging similar tokens of a model that optin knows: `standalone.merging` does it, the anatomy says where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from optin_cli.architectures.token_sites import check_merges
from optin_cli.standalone.merging import Merging, merge_tokens
from optin_cli.structure.anatomy import Anatomy


def install_merges(
    model: nn.Module,
    anatomy: Anatomy,
    merges: Sequence[int],
    keep: Mapping[str, Sequence[int]] | None = None,
    what: str = "the schedule",
) -> Merging:
    """Make `model` merge tokens by a schedule, until `remove`.

    With `keep`, site name -> units, only the keys of the kept heads are compared: a masked model then merges what the
    sliced one will. Raises `ArtefactError` for a schedule that does not fit the model; `what` names it.
    """
    check_merges(anatomy, merges, what)
    if not any(merges):
        return Merging(merges, anatomy.prefix)
    options = merging_options(anatomy, merges)
    for site, place in zip(anatomy.token_sites, options["sites"], strict=True):
        place["kept"] = None if keep is None else list(keep[site.heads])
    return merge_tokens(model, model.get_submodule, **options)


def merging_options(anatomy: Anatomy, merges: Sequence[int]) -> dict[str, Any]:
    """Where and how many tokens merge, as plain data: what `standalone.merging.merge_tokens` takes."""
    sites = [
        {
            "block": site.block,
            "keys": site.keys.path,
            "part": site.part,
            "parts": site.keys.parts,
            "width": anatomy[site.heads].width,
            "attention": site.attention,
            "bias": site.bias,
        }
        for site in anatomy.token_sites
    ]
    return {
        "counts": list(merges),
        "prefix": anatomy.prefix,
        "blocks": list(anatomy.blocks),
        "sites": sites,
    }
