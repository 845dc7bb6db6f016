"""Where all query heads share one head of keys and values, each is a unit; keys and values go with the last."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.families import BLOCKS, HEADS
from helpers.models import opened, saved_model, shared_model
from helpers.promises import counted_macs, masked_outputs, sliced
from helpers.pruning import sliced_copy
from helpers.runs import outputs, random_inputs

from optin_cli.architectures.resolve import dissect

NAME = "gemma3-one-group"
SITES = [f"blocks.{block}.heads" for block in range(BLOCKS)]


@pytest.mark.parametrize("left", [[], [2], [0, 3], [0, 1, 2, 3]])
def test_keys_and_values_stay_until_the_last_head_goes(left):
    model = shared_model(NAME)
    site = model.anatomy[SITES[1]]
    attention = model.module.get_submodule(site.consumer.rpartition(".")[0])
    shared = attention.k_proj.weight.numel() + attention.v_proj.weight.numel()
    assert site.units == HEADS and (site.base_macs_per_token, site.base_params) == (shared, shared)

    smaller = sliced(model, {site.name: left})
    cut = smaller.get_submodule(site.consumer.rpartition(".")[0])
    rows = site.width if left else 0
    assert cut.k_proj.weight.shape[0] == cut.v_proj.weight.shape[0] == rows
    assert cut.q_proj.weight.shape[0] == cut.o_proj.weight.shape[1] == site.width * len(left)
    if left:
        assert torch.equal(cut.k_proj.weight, attention.k_proj.weight)
        assert cut.num_key_value_groups == len(left)
    found = outputs(model, smaller, random_inputs(model))
    torch.testing.assert_close(found, masked_outputs(model, {site.name: left}), rtol=0, atol=1e-5)

    counted, tokens = counted_macs(model, smaller)
    kept = {one.name: one.units for one in model.anatomy} | {site.name: len(left)}
    assert model.anatomy.macs(tokens, kept) == pytest.approx(counted)
    saved = counted_macs(model, model.module)[0] - counted
    assert saved == pytest.approx(site.macs(tokens, site.units) - site.macs(tokens, len(left)))
    gone = sum(p.numel() for p in model.module.parameters()) - sum(p.numel() for p in smaller.parameters())
    assert gone == site.params(site.units) - site.params(len(left))


def test_heads_are_pruned_again_in_what_was_written(tmp_path):
    sliced_copy(saved_model(NAME), tmp_path / "once", {SITES[0]: [1, 2, 3], SITES[1]: [2], SITES[2]: []})
    once = opened(tmp_path / "once")
    assert [once.anatomy[site].units for site in SITES] == [3, 1, 0]
    assert [once.anatomy[site].one_group for site in SITES] == [True, False, False]
    assert once.anatomy[SITES[1]].base_params == 0  # of a single head keys and values are its own
    sliced_copy(tmp_path / "once", tmp_path / "twice", {SITES[0]: [2]})
    twice = opened(tmp_path / "twice")
    dense = shared_model(NAME)
    found = outputs(twice, twice.module, random_inputs(dense))
    expected = masked_outputs(dense, {SITES[0]: [3], SITES[1]: [2], SITES[2]: []})
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_of_several_groups_the_one_that_is_left_stays_a_unit(tmp_path):
    """Else the units of a pruned model would be others than those of its mask."""
    dense = shared_model("llama")
    keep = {site: [1] for site in SITES}
    sliced_copy(saved_model("llama"), tmp_path / "one", keep)
    one = opened(tmp_path / "one")
    assert [(one.anatomy[site].units, one.anatomy[site].group) for site in SITES] == [(1, 2)] * BLOCKS
    assert dissect(one.module, one.family) == one.anatomy
    found = outputs(one, one.module, random_inputs(dense))
    torch.testing.assert_close(found, masked_outputs(dense, keep), rtol=0, atol=1e-5)


def test_a_directory_from_before_opens_with_its_whole_attentions(tmp_path):
    """Then a group was a unit, and the family in the record said nothing of query heads."""
    sliced_copy(saved_model(NAME), tmp_path / "m", {SITES[1]: []})
    path = tmp_path / "m" / "optin.json"
    record = json.loads(path.read_text())
    for table in record["family"]["sites"]:
        del table["query_heads"]
    record["kept"] |= {SITES[0]: [0], SITES[2]: [0]}
    path.write_text(json.dumps(record))
    before = opened(tmp_path / "m")
    assert [(before.anatomy[site].units, before.anatomy[site].group) for site in SITES] == [
        (1, HEADS), (0, 1), (1, HEADS)
    ]  # fmt: skip
