"""Selection by a latency table."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from helpers.artefacts import latency_table
from helpers.selection import kept, ranking

from optin_cli.errors import ArtefactError
from optin_cli.selection.select import select
from optin_cli.selection.settings import Request


def test_a_stair_is_climbed_in_whole_steps():
    """Sizes that cost as much as a larger one are never chosen: the stair is flat, so take all of it."""
    made = ranking()
    table = latency_table(made.sites, step=5)
    for share in np.linspace(0.35, 0.95, 7):
        mask = select(made, Request(latency=share, table=table))
        assert table.model_ms(kept(mask)) <= share * table.total_ms * (1 + 1e-9)
        assert {n % 5 for name, n in kept(mask).items() if "neurons" in name} == {0}


@pytest.mark.parametrize("slow", [0.0, 5.0])
def test_any_curve_gives_what_trying_all_sizes_gives(slow):
    """Neurons are slower at 15 than at 16, and with `slow` at none than at one: kernels are like that."""
    made = ranking(blocks=1, widths=(1,))
    table = latency_table(made.sites)
    heads, neurons = table.curves
    heads["ms"] = [0.0, 3.0, 6.0, 9.0, 12.0]
    neurons["counts"], neurons["ms"] = [0, 1, 10, 15, 16, 20], [slow, 1.0, 10.0, 40.0, 12.0, 20.0]
    table.total_ms, table.fixed_ms = 33.0, 1.0
    best = {site.name: np.append(0, np.cumsum(np.sort(site.score)[::-1])) for site in made.sites}
    total = sum(float(scores[-1]) for scores in best.values())
    for budget in np.arange(2.5, 33, 0.5):
        choices = [dict(zip(best, sizes, strict=True)) for sizes in product(range(5), range(21))]
        expected = max(
            sum(best[name][n] for name, n in choice.items())
            for choice in choices
            if table.model_ms(choice) <= budget
        )
        mask = select(made, Request(latency_ms=budget, table=table))
        assert mask.reached["latency_ms"] <= budget * (1 + 1e-9)
        assert mask.objective["kept"] == pytest.approx(expected / total)


def test_latency_of_the_current_model():
    made = ranking()
    table = latency_table(made.sites)
    for site in made.sites:
        site.units -= 1
        site.score, site.output, site.trajectory = site.score[1:], site.output[1:], site.trajectory[1:]
    now = table.model_ms({s.name: s.units for s in made.sites})
    assert now < table.total_ms
    mask = select(made, Request(latency=0.8, relative_to="current", table=table))
    assert 0.6 * now < table.model_ms(kept(mask)) <= 0.8 * now * (1 + 1e-9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device": "NVIDIA H100"}, "another device"),
        ({"dtype": "bfloat16"}, "another dtype"),
        ({"processor": "abacus"}, "another processor"),
    ],
)
def test_a_table_of_another_device_is_refused_unless_forced(change, words):
    made = ranking()
    table = latency_table(made.sites, **change)
    with pytest.raises(ArtefactError, match=words) as caught:
        select(made, Request(latency=0.5, table=table))
    assert "force=True" in caught.value.hint
    assert select(made, Request(latency=0.5, table=table, force=True)).keep


@pytest.mark.parametrize("other", [{"blocks": 2}, {"heads": 3}, {"neurons": 19}, {"blocks": 4}])
def test_a_table_of_another_shape_is_refused_even_then(other):
    table = latency_table(ranking(**other).sites)
    with pytest.raises(ArtefactError, match="another shape"):
        select(ranking(), Request(latency=0.5, table=table, force=True))


def test_a_table_of_a_pruned_model_knows_nothing_of_the_dense_one():
    made = ranking()
    table = latency_table(made.sites)
    table.model["dense_digest"] = "another"
    with pytest.raises(ArtefactError, match="relative_to='current'"):
        select(made, Request(latency=0.5, table=table))
    assert select(made, Request(latency=0.5, table=table, relative_to="current")).keep
