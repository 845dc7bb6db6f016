"""What `bench` says where a speed-up is far from what the MACs promise."""

from __future__ import annotations

import pytest

from optin_cli.commands.present import advise_latency


def row(model, batch, efficiency=None, saturated=True):
    found = {"model": model, "setting": {"batch_size": batch, "size": 32}, "saturated": saturated}
    return found if efficiency is None else found | {"efficiency": efficiency}


@pytest.mark.parametrize(
    ("pruned", "says"),
    [
        ([("small", 32, 0.57, True)], "small has 57 % of the speed-up that its MACs promise at batch 32"),
        ([("small", 32, 0.76, True)], ""),
        ([("small", 1, 0.4, False)], ""),  # the device is not full: no budget changes that
        ([("small", 8, 0.7, True), ("small", 32, 0.6, True)], "--table t.json --batch-size 32"),
    ],
)
def test_a_latency_table_is_the_advice_where_the_ideal_is_missed(pruned, says, capsys):
    rows = []
    for model, batch, efficiency, saturated in pruned:
        rows += [row("dense", batch), row(model, batch, efficiency, saturated)]
    advise_latency(rows)
    told = " ".join(capsys.readouterr().err.split())
    assert says in told and ("optin select RANKING --latency" in told) == bool(says)
