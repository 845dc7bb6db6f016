"""`select`: solve the FLOP-constrained mask from a ranking."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from optin_cli.artefacts.mask import Mask
from optin_cli.artefacts.ranking import RankedSite, Ranking, combine
from optin_cli.errors import BudgetError, UsageError
from optin_cli.selection.solver import Bools, Floats, solve


@dataclass(frozen=True)
class Guards:
    """What the mask must leave alone."""

    min_heads: int = 0
    min_neurons: int = 0
    protect: tuple[str, ...] = ()
    """Globs over site names; a matching site is kept whole."""

    def minimum(self, site: RankedSite) -> int:
        """Units of `site` that must stay."""
        if any(fnmatchcase(site.name, glob) for glob in self.protect):
            return site.units
        least = {"heads": self.min_heads, "neurons": self.min_neurons}.get(site.kind, 0)
        return min(least, site.units)


def select(
    ranking: Ranking,
    flops: float,
    *,
    guards: Guards | None = None,
    output_weight: float | None = None,
    relative_to: str = "dense",
    tokens: float | None = None,
) -> Mask:
    """The best mask that keeps at most the fraction `flops` of the MACs.

    `output_weight` recombines the scores' parts (lambda of OPTIN equation 1); None takes the stored scores.
    `relative_to` `dense` counts from the original dense model, `current` from the ranked one. `tokens` is the
    sequence length the budget holds for; None takes the calibration mean. Raises `UsageError` and `BudgetError`.
    """
    guards = guards or Guards()
    check_request(flops, relative_to, tokens, guards)
    _check_globs(ranking, guards)
    tokens = tokens or ranking.tokens
    reference = ranking.dense_macs(tokens) if relative_to == "dense" else ranking.macs(tokens)
    sites = sorted(ranking.sites, key=lambda s: (s.block, s.kind))
    scores = _scores(ranking, sites, output_weight)
    costs = np.concatenate([np.full(s.units, s.macs_per_unit(tokens)) for s in sites])
    forced = np.concatenate([_forced(s, part, guards) for s, part in zip(sites, scores, strict=True)])
    everything = np.concatenate(scores)
    solution = solve(everything, costs, flops * reference, forced)
    if solution is None:
        least = costs[forced].sum() / reference
        raise BudgetError(
            f"--flops {flops:g} can't be met: what the guards keep is already {least:.4f} of the MACs",
            f"the smallest budget that can be reached is --flops {np.ceil(least * 1e4) / 1e4:.4f}; "
            "relax --min-heads, --min-neurons or --protect to go lower",
        )
    keep = _split(sites, solution.keep)
    total = float(everything.sum()) or 1.0
    return Mask(
        model_digest=ranking.model["digest"],
        ranking_digest=ranking.digest,
        family=ranking.model["family"],
        budget={
            "flops": flops,
            "relative_to": relative_to,
            "tokens": tokens,
            "output_weight": output_weight,
            "min_heads": guards.min_heads,
            "min_neurons": guards.min_neurons,
            "protect": list(guards.protect),
        },
        reached={
            "flops": solution.cost / reference,
            "macs": solution.cost,
            "dense_macs": ranking.dense_macs(tokens),
            "params": float(sum(len(keep[s.name]) * s.params_per_unit for s in sites)),
            "dense_params": float(ranking.dense["site_params"]),
        },
        objective={
            "kept": solution.score / total,
            "bound": solution.bound / total,
            "gap": solution.gap / total,
        },
        calibration={**ranking.data, "row_ids": ranking.row_ids[:64]},
        units={s.name: s.units for s in sites},
        keep=keep,
        summary={s.name: f"{len(keep[s.name])}/{s.units}" for s in sites},
    )


def check_request(flops: float, relative_to: str, tokens: float | None, guards: Guards) -> None:
    """Raise `UsageError` for what no ranking could serve: checked before anything expensive."""
    if not 0 < flops <= 1:
        raise UsageError(f"--flops {flops:g} is not a fraction", "give the share of MACs to keep, in (0, 1]")
    if relative_to not in ("dense", "current"):
        raise UsageError(f"--relative-to {relative_to}", "use dense or current")
    if tokens is not None and tokens <= 0:
        raise UsageError(f"--tokens {tokens:g}: a sequence has at least one token")
    if guards.min_heads < 0 or guards.min_neurons < 0:
        raise UsageError("--min-heads and --min-neurons can't be negative")


def emptied_sites(mask: Mask) -> list[str]:
    """Sites that lost all their units."""
    return [name for name, kept in mask.keep.items() if not kept and mask.units[name]]


def _scores(ranking: Ranking, sites: list[RankedSite], output_weight: float | None) -> list[Floats]:
    if output_weight is None:
        return [site.score for site in sites]
    if output_weight < 0:
        raise UsageError(f"--lambda {output_weight:g} is negative")
    if not all(site.columns for site in sites):
        raise UsageError(
            f"a {ranking.method} ranking has no parts to recombine", "leave --lambda out, or score with auto"
        )
    combined = combine(sites, output_weight)
    return [combined[site.name] for site in sites]


def _forced(site: RankedSite, scores: Floats, guards: Guards) -> Bools:
    """The best units of a site, as many as the guards demand."""
    forced = np.zeros(site.units, dtype=bool)
    forced[np.argsort(-scores, kind="stable")[: guards.minimum(site)]] = True
    return forced


def _split(sites: list[RankedSite], keep: Bools) -> dict[str, list[int]]:
    bounds = np.cumsum([s.units for s in sites])[:-1]
    return {
        s.name: np.flatnonzero(part).tolist() for s, part in zip(sites, np.split(keep, bounds), strict=True)
    }


def _check_globs(ranking: Ranking, guards: Guards) -> None:
    for glob in guards.protect:
        if not any(fnmatchcase(site.name, glob) for site in ranking.sites):
            names = ", ".join(site.name for site in ranking.sites[:3])
            raise UsageError(f"--protect {glob!r} matches no site", f"sites are named like {names}")
