"""From a ranking to a mask: budgets, guards, recombination, bad input."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st

from optin_cli.artefacts.mask import mask_to_json
from optin_cli.artefacts.ranking import RankedSite, Ranking, combine
from optin_cli.errors import BudgetError, UsageError
from optin_cli.selection.select import Guards, emptied_sites, select


def ranking(
    blocks: int = 3, heads: int = 4, neurons: int = 20, seed: int = 0, pruned: float = 1.0
) -> Ranking:
    """A ranking of a made-up model; `pruned` < 1 makes the dense original larger than what is ranked."""
    rng = np.random.default_rng(seed)
    sites = []
    for block in range(blocks):
        for kind, units, cost, pair in (("heads", heads, 640, 16), ("neurons", neurons, 64, 0)):
            trajectory = rng.lognormal(0, 1, (units, 2))
            output = rng.lognormal(3, 1, units)
            site = RankedSite(
                f"blocks.{block}.{kind}", kind, block, units, 8, cost, pair, cost, trajectory.sum(1), trajectory,
                output, [1, 2],
            )  # fmt: skip
            sites.append(site)
    made = Ranking(
        model={"digest": "d" * 64, "family": "made-up", "id": "m", "task": "t", "class": "c"},
        data={"fingerprint": "f", "spec": "s", "split": "train"},
        row_ids=[0, 1],
        method="ablation",
        settings={},
        tokens=10.0,
        dense={"site_params": 1},
        sites=sites,
    )
    made.dense["macs_per_token"] = sum(s.units * s.macs_per_token for s in sites) / pruned
    made.dense["macs_per_pair"] = sum(s.units * s.macs_per_pair for s in sites) / pruned
    return made


def macs_of(made: Ranking, mask, tokens: float = 10.0) -> float:
    return sum(len(mask.keep[s.name]) * s.macs_per_unit(tokens) for s in made.sites)


@examples(60)
@given(st.floats(0.01, 1.0), st.integers(0, 50))
def test_the_budget_is_never_exceeded(flops, seed):
    made = ranking(seed=seed)
    mask = select(made, flops)
    assert macs_of(made, mask) <= flops * made.dense_macs(10.0) * (1 + 1e-9)
    assert mask.reached["flops"] == pytest.approx(macs_of(made, mask) / made.dense_macs(10.0))
    assert 0 <= mask.objective["kept"] <= mask.objective["bound"] <= 1 + 1e-9


def test_the_best_units_of_a_site_are_kept():
    made = ranking()
    mask = select(made, 0.5)
    for site in made.sites:
        kept = set(mask.keep[site.name])
        best = set(np.argsort(-site.score, kind="stable")[: len(kept)].tolist())
        assert kept == best


def test_everything_is_kept_at_one():
    assert all(len(k) == n for k, n in zip(select(ranking(), 1.0).keep.values(), (4, 20) * 3, strict=True))


def test_small_budgets_empty_layers_and_say_so():
    mask = select(ranking(), 0.02)
    assert emptied_sites(mask)
    assert all(not mask.keep[name] for name in emptied_sites(mask))


@examples(30)
@given(st.integers(0, 4), st.integers(0, 20), st.floats(0.1, 1.0))
def test_guards_hold_or_the_budget_is_refused(heads, neurons, flops):
    made = ranking()
    least = sum(
        min(heads if s.kind == "heads" else neurons, s.units) * s.macs_per_unit(10) for s in made.sites
    )
    try:
        mask = select(made, flops, guards=Guards(heads, neurons))
    except BudgetError as error:
        assert least > flops * made.dense_macs(10)
        assert error.exit_code == 4
        reachable = float(error.hint.split("--flops ")[1].split(";")[0])
        assert macs_of(made, select(made, min(reachable, 1.0), guards=Guards(heads, neurons))) >= least
        return
    for site in made.sites:
        assert len(mask.keep[site.name]) >= (heads if site.kind == "heads" else neurons)


def test_protected_sites_stay_whole():
    mask = select(ranking(), 0.7, guards=Guards(protect=("blocks.0.*", "*.2.heads")))
    assert len(mask.keep["blocks.0.heads"]) == 4
    assert len(mask.keep["blocks.0.neurons"]) == 20
    assert len(mask.keep["blocks.2.heads"]) == 4


def test_budgets_of_a_pruned_model_count_from_the_dense_one():
    made = ranking(pruned=0.8)
    dense, current = select(made, 0.5), select(made, 0.5, relative_to="current")
    assert macs_of(made, dense) <= 0.5 * made.dense_macs(10)
    assert macs_of(made, current) <= 0.5 * made.macs(10) < macs_of(made, dense)


def test_lambda_recombines_the_parts():
    made = ranking()
    output_only = select(made, 0.5, output_weight=1e9)
    for site in made.sites:
        best = set(np.argsort(-site.output, kind="stable")[: len(output_only.keep[site.name])].tolist())
        assert set(output_only.keep[site.name]) == best
    for site in made.sites:
        site.score = combine(made.sites, 0.7)[site.name]
    assert select(made, 0.5).keep == select(made, 0.5, output_weight=0.7).keep


@pytest.mark.parametrize("tokens", [1, 10, 2000])
def test_the_budget_holds_at_the_asked_length(tokens):
    made = ranking()
    mask = select(made, 0.5, tokens=tokens)
    assert macs_of(made, mask, tokens) <= 0.5 * made.dense_macs(tokens)
    assert mask.reached["macs"] == pytest.approx(macs_of(made, mask, tokens))


def test_the_same_ranking_gives_the_same_bytes():
    assert mask_to_json(select(ranking(), 0.4)) == mask_to_json(select(ranking(), 0.4))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"flops": 0}, "--flops"),
        ({"flops": -0.5}, "--flops"),
        ({"flops": 1.01}, "--flops"),
        ({"flops": float("nan")}, "--flops"),
        ({"flops": 0.5, "relative_to": "moon"}, "relative-to"),
        ({"flops": 0.5, "tokens": 0}, "tokens"),
        ({"flops": 0.5, "output_weight": -1}, "lambda"),
        ({"flops": 0.5, "guards": Guards(protect=("nothing.*",))}, "matches no site"),
        ({"flops": 0.5, "guards": Guards(min_heads=-1)}, "negative"),
    ],
)
def test_wrong_requests(arguments, words):
    with pytest.raises(UsageError, match=words):
        select(ranking(), **arguments)


def test_a_ranking_without_parts_can_not_be_recombined():
    made = ranking()
    for site in made.sites:
        site.columns, site.trajectory = [], np.zeros((site.units, 0))
    with pytest.raises(UsageError, match="no parts"):
        select(made, 0.5, output_weight=0.5)
