"""Heads and ranks together: the sizes of attention, whose cost is the product of two numbers.

A site of heads that can be cut has a size for every number of heads and every rank of them. Each costs what as many
whole heads would that have as many dimensions, or the milliseconds of a latency table; of those that cost the same the
one that keeps most is a choice of the knapsack. So a product is one class of it, which the solver treats exactly.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from optin_cli.artefacts.ranking import RankedSite, Ranking
from optin_cli.importance import OPTIN_SUM, FeatureWeights, losses
from optin_cli.selection.choices import Floats, Ints
from optin_cli.selection.settings import Request

log = logging.getLogger("optin")

STEP = 4
"""The multiple that ranks come in, at least: a layer of heads of 32 has 8 ranks to choose from, one of 64 16."""


@dataclass(frozen=True)
class RankSizes:
    """The sizes of one site of heads: how many heads, of which rank, and what that keeps of the site's score."""

    heads: Ints
    """[sizes]"""
    ranks: Ints
    """[sizes] dimensions of a head."""
    gains: Floats
    """[sizes] what they keep of the site's score; ascending, of sites that share their sizes in the sum."""
    shares: Floats
    """[width + 1] what each rank keeps of the score of the heads that stay."""
    counts: Ints
    """[sizes] ascending, what stands for each: the dimensions of all heads together; where a size does not cost in
    proportion to these its place."""

    @property
    def width(self) -> int:
        """Dimensions of a whole head."""
        return len(self.shares) - 1

    def share(self, rank: int) -> float:
        """What a rank keeps of the score of the heads that stay."""
        return float(self.shares[rank])

    def at(self, count: int) -> tuple[int, int]:
        """(heads, rank) of the size that a count stands for."""
        place = int(np.searchsorted(self.counts, count))
        return int(self.heads[place]), int(self.ranks[place])


def rank_losses(
    ranking: Ranking, output_weight: float, feature_weights: FeatureWeights = OPTIN_SUM
) -> dict[str, Floats]:
    """Site -> loss of rank 0, 1, .. width, on the scale of `combine`: the units' lambda. It never rises with rank."""
    found = losses(ranking, ranking.rank_sites, output_weight, feature_weights)
    return {
        site: np.append(np.maximum.accumulate(loss[::-1])[::-1], 0.0)  # never less for a lower rank
        for site, loss in found.items()
    }


def searched_ranks(request: Request, ranking: Ranking) -> bool:
    """Whether heads may be cut to lower ranks: where the ranking says what that costs, and every budget can tell."""
    if request.cuts_ranks is False:
        return False
    if not ranking.rank_sites:
        if request.cuts_ranks:
            log.warning(
                "the ranking does not say what lower ranks of heads cost, so that heads stay whole: "
                "`optin score --ranks` measures that"
            )
        return False
    if not request.knows_ranks:
        table = request.table is not None and not request.table.knows_ranks()
        knows = "the latency table (`optin bench MODEL --table` times ranks, too)" if table else "a budget"
        log.warning("%s knows whole heads alone: no head is cut to a lower rank", knows)
        return False
    return True


def rank_sizes(
    sites: Sequence[RankedSite],
    scores: Sequence[Floats],
    losses: Sequence[Floats],
    counts: Ints,
    request: Request,
    step: int,
    price: Callable[[Ints, Ints], Floats] | None = None,
) -> dict[str, RankSizes]:
    """Site -> the sizes worth choosing, for the numbers of heads in `counts`; of several sites those that all have.

    `price` says what (heads, ranks) cost, where that is not in proportion to the dimensions of all heads.

    Keeping the best h heads at rank r keeps P(h) (1 - L(r) / P(H)) of the score P(H) of all heads, L(r) the loss of
    that rank with all of them: heads that are gone have nothing to lose. A rank that loses more than all heads are
    worth one by one keeps nothing.
    """
    whole = sites[0].units * sites[0].width
    ranks = np.array(sorted(set.intersection(*(set(allowed_ranks(site, request, step)) for site in sites))))
    heads, ranks = (grid.ravel() for grid in np.meshgrid(counts, ranks, indexing="ij"))
    ranks = np.where(heads == 0, sites[0].width, ranks)
    enough = heads * ranks >= np.ceil(whole * (1 - request.max_prune) - 1e-9)
    heads, ranks = heads[enough], ranks[enough]
    shares, kept = [], []
    for one, lost in zip(scores, losses, strict=True):
        prefix = np.concatenate([[0.0], np.cumsum(-np.sort(-one))])
        shares.append(np.clip(1 - lost / prefix[-1], 0, 1) if prefix[-1] > 0 else np.ones(len(lost)))
        kept.append(prefix[heads] * shares[-1][ranks])
    gains, costs = np.sum(kept, axis=0), heads * ranks if price is None else price(heads, ranks)
    all_of_it = (heads == sites[0].units) & (ranks == sites[0].width)  # always allowed
    below = np.flatnonzero(all_of_it | (costs < costs[all_of_it]))
    order = below[
        np.lexsort((-heads[below], -gains[below], costs[below]))
    ]  # of equal ones that with more heads
    costs, gains = costs[order], gains[order]
    best = np.concatenate([[-np.inf], np.maximum.accumulate(gains)[:-1]])
    better = (gains > best) & np.concatenate([[True], costs[1:] > costs[:-1]])
    better[-1] = True
    chosen = order[better]
    counts = (heads * ranks)[chosen] if price is None else np.arange(len(chosen))
    return {
        site.name: RankSizes(heads[chosen], ranks[chosen], gain[chosen], share, counts)
        for site, gain, share in zip(sites, kept, shares, strict=True)
    }


def allowed_ranks(site: RankedSite, request: Request, step: int) -> Ints:
    """The ranks that guards and rounding allow, ascending; a whole head always is."""
    if request.keeps_whole(site):
        return np.array([site.width])
    ranks = np.arange(step, site.width, step)
    return np.append(ranks, site.width)


def whole_units(
    kept: Mapping[str, int], ranks: Mapping[str, int], sites: Sequence[RankedSite]
) -> dict[str, float]:
    """Site -> units, heads of a lower rank counted as the whole ones that cost as much."""
    widths = {site.name: site.width for site in sites}
    return {
        name: units * ranks[name] / widths[name] if name in ranks else units for name, units in kept.items()
    }
