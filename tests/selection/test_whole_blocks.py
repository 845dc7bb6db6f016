"""Masks of whole blocks: brute force tries every set of blocks."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from helpers.artefacts import latency_table
from helpers.runs import examples
from helpers.selection import kept, macs_of, params_of, ranking
from hypothesis import given
from hypothesis import strategies as st

from optin_cli.errors import BudgetError
from optin_cli.selection.select import select
from optin_cli.selection.settings import Request


def grouped(**kwargs):
    """A ranking whose units go by the block."""
    return dataclasses.replace(ranking(**kwargs), settings={"whole_blocks": True, "recombines": False})


@examples(30)
@given(
    st.floats(0.05, 1), st.floats(0.3, 1), st.integers(0, 50), st.sampled_from([(1,) * 5, (1, 2, 5, 1, 3)]),
    st.booleans(), st.integers(0, 2),
)  # fmt: skip
def test_no_set_of_blocks_within_the_budgets_keeps_more(flops, params, seed, widths, timed, min_heads):
    made = grouped(blocks=5, seed=seed, widths=widths)
    request = Request(flops=flops, params=params, min_heads=min_heads)
    table = latency_table(made.sites)
    if timed:
        request = dataclasses.replace(request, table=table, latency=0.9)
    best, found, everything = None, None, select(made, 1.0)
    for blocks in itertools.product([False, True], repeat=5):
        keep = {
            site.name: sorted(
                site.score.argsort(kind="stable")[::-1][
                    : site.units if blocks[site.block] else min_heads * (site.kind == "heads")
                ].tolist()
            )
            for site in made.sites
        }
        mask = dataclasses.replace(everything, keep=keep)
        fits = macs_of(made, mask) <= flops * made.dense_macs(10.0) * (1 + 1e-12)
        fits &= params_of(made, mask) <= params * made.dense["params"] * (1 + 1e-12)
        if timed:
            fits &= table.model_ms(kept(mask)) <= 0.9 * table.total_ms * (1 + 1e-12)
        if fits:
            score = sum(float(site.score[keep[site.name]].sum()) for site in made.sites)
            best = score if best is None else max(best, score)
    try:
        found = select(made, request)
    except BudgetError:
        assert best is None
        return
    assert best is not None
    assert sum(float(s.score[found.keep[s.name]].sum()) for s in made.sites) == pytest.approx(best)
    for site in made.sites:
        assert kept(found)[site.name] in (site.units, min_heads if site.kind == "heads" else 0)


def test_protected_sites_stay_and_the_rest_of_their_block_goes():
    made = grouped(blocks=4)
    found = kept(select(made, Request(flops=0.8, protect=("blocks.*.heads",))))
    assert all(count == 4 for name, count in found.items() if name.endswith("heads"))
    assert {count for name, count in found.items() if name.endswith("neurons")} == {0, 20}
