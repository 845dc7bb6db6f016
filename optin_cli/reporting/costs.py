"""The cost of each block with the units that are kept: MACs, parameters, and milliseconds by a latency table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optin_cli.artefacts.latency import LatencyTable
from optin_cli.artefacts.ranking import Ranking
from optin_cli.selection.ranks import whole_units


@dataclass(frozen=True)
class BlockCost:
    """What the units of one block cost."""

    block: int
    macs: float
    params: float
    ms: float | None
    """None without a latency table, and where layers lie between two sites: their times are no sums."""


def block_costs(
    ranking: Ranking,
    kept: Mapping[str, int],
    tokens: float,
    merges: Sequence[int] = (),
    table: LatencyTable | None = None,
    ranks: Mapping[str, int] | None = None,
) -> list[BlockCost]:
    """The cost of each block that has sites, with `kept` units (site -> number), heads at their `ranks`, and
    `tokens` in the first block.

    A layer between two sites costs the product of what is left of both; half of it counts for each site's block. Summed
    over blocks it is what a mask's `reached` says of the sites.
    """
    whole = whole_units(kept, ranks or {}, ranking.sites)
    seen = ranking.tokens_by_block(tokens, merges or ranking.merges)
    macs: dict[int, float] = {}
    params: dict[int, float] = {}
    ms: dict[int, float] = {}
    block_of = {site.name: site.block for site in ranking.sites}
    for site in ranking.sites:
        count, block = whole[site.name], site.block
        macs[block] = macs.get(block, 0.0) + site.macs(seen[block], count)
        params[block] = params.get(block, 0.0) + site.params(count)
        if table:
            rank = (ranks or {}).get(site.name, site.width)
            ms[block] = ms.get(block, 0.0) + float(table.site_ms(site.name, [kept[site.name]], rank)[0])
    units = {site.name: site.units for site in ranking.sites}
    for layer in ranking.coupled:
        saved = layer.pairs_saved(units, whole) / 2
        for name in (layer.made, layer.read):
            macs[block_of[name]] -= saved * layer.macs_per_token * tokens
            params[block_of[name]] -= saved * layer.params
    timed = bool(table) and not ranking.coupled
    return [BlockCost(b, macs[b], params[b], ms[b] if timed else None) for b in sorted(macs)]
