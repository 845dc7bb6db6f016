"""Rankings with sketches, and exchanges of their units."""

from __future__ import annotations

import numpy as np

from optin_cli.artefacts.ranking import RankedSite, Ranking
from optin_cli.artefacts.sketch import Sketch
from optin_cli.importance import combine
from optin_cli.selection.interactions import Half, halves, rearrange
from optin_cli.selection.problem import pose
from optin_cli.selection.settings import Request
from optin_cli.selection.solver import solve

EXAMPLES = 160


def made(blocks: int = 2, heads: int = 3, neurons: int = 12, seed: int = 0, widths=(1, 1, 1)) -> Ranking:
    """A ranking whose parts are what `sketch_of` holds."""
    rng = np.random.default_rng(seed)
    sites = []
    for block in range(blocks):
        for kind, units, cost in (("heads", heads, 500), ("neurons", neurons, 100)):
            cost *= widths[block]
            trajectory = rng.lognormal(0, 0.5, (units, 1))
            site = RankedSite(
                f"blocks.{block}.{kind}", kind, block, units, 8, cost, 0, cost + 1, trajectory.sum(1), trajectory,
                rng.lognormal(1, 0.5, units), [blocks - 1],
            )  # fmt: skip
            sites.append(site)
    macs = sum(s.units * s.macs_per_token for s in sites)
    params = sum(s.units * s.params_per_unit for s in sites)
    ranking = Ranking(
        model={"digest": "d", "family": "f", "id": "m", "task": "t", "class": "c"},
        data={"fingerprint": "f", "spec": "s", "split": "train"},
        row_ids=[0],
        method="curvature",
        settings={"output_weight": 1.0, "recombines": True},
        tokens=10.0,
        dense={
            "params": params + 1000,
            "site_params": params,
            "macs_per_token": macs,
            "macs_per_pair": 0,
            "dtype": "float32",
        },
        sites=sites,
    )
    for site in sites:
        site.score = combine(sites, 1.0)[site.name]
    return ranking


def sketch_of(ranking: Ranking, rank: int = 3, noise: float = 0.3, seed: int = 0, probes: int = 1) -> Sketch:
    """Gradients that a few directions explain, the same ones in every example, and noise; rank 0: noise alone."""
    rng = np.random.default_rng(seed)
    numbers = np.repeat(np.arange(EXAMPLES), probes)
    directions = rng.normal(size=(len(numbers), rank))
    parts = []
    for part in ("trajectory", "output"):
        found = {}
        for site in ranking.sites:
            worth = site.trajectory.sum(1) if part == "trajectory" else site.output
            rows = directions @ rng.normal(size=(rank, site.units)) / max(rank, 1) ** 0.5
            rows = rows + noise * rng.normal(size=rows.shape)
            found[site.name] = (rows * np.sqrt(worth / (rows**2).sum(0))).astype(np.float32)
        parts.append(found)
    return Sketch(numbers, *parts)


def posed(ranking: Ranking, request: Request):
    problem = pose(ranking, request)
    solution = solve(problem.site_sizes, problem.capacities)
    return problem, problem.keep(solution.counts)


def exchanged(ranking: Ranking, request: Request, sketch: Sketch, scope: str, ridge: float = 1.0):
    problem, keep = posed(ranking, request)
    fit, check = halves(problem.sites, problem.scores, sketch)
    found = rearrange(keep, problem.scores, problem.site_sizes, problem.capacities, fit, check, scope, ridge)
    return problem, keep, fit, check, found


def joint(problem, keep, half: Half, ridge: float) -> float:
    """The loss as docs/method.md, section 5 writes it: row by row, no Gram, no bookkeeping."""
    total, loss, start = 0.0, 0.0, 0
    removed = []
    for site, scores in zip(problem.sites, problem.scores, strict=True):
        gone = [u for u in range(site.units) if u not in set(keep[site.name])]
        removed += [start + u for u in gone]
        loss += ridge * sum(scores[u] for u in gone)
        total += scores.sum()
        start += site.units
    for row in range(half.rows.shape[1]):
        loss += sum(float(half.rows[u, row]) for u in removed) ** 2
    return loss / total
